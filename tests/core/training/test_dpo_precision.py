"""Precisions of DPO training: PEFT's input cast off changes no bit."""

from contextlib import contextmanager

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_cases import config, train

from hgdpo_core.training import dpo


@contextmanager
def kept_gradients():
    """The gradient of each optimizer step inside, of all LoRA weights in one float32 tensor on the CPU."""
    kept = []

    def keep(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        kept.append(torch.cat([gradient.detach().cpu().flatten() for gradient in gradients]))

    hook = register_optimizer_step_pre_hook(keep)
    try:
        yield kept
    finally:
        hook.remove()


@pytest.mark.parametrize(("device", "settings"), [
    ("cpu", {}), ("cpu", {"mixed_precision": "bf16"}),
    ("cpu", {"mixed_precision": "bf16", "gradient_checkpointing": True}),
    ("cuda", {"mixed_precision": "fp16", "max_steps": 2})])
def test_pefts_input_cast_off_changes_no_bit(request, monkeypatch, device, settings):
    """Also with what CUDA's autocast casts, on a pretended GPU: there norms give float32."""
    if device == "cuda":
        request.getfixturevalue("cuda")
    else:
        monkeypatch.setenv("HGDPO_DEVICE", "cpu")
    settings = config(**settings, max_grad_norm=1e9)
    with kept_gradients() as ours:
        _, result = train(settings)
    monkeypatch.setattr(dpo, "cast_lora_weights", lambda network: None)
    with kept_gradients() as pefts:
        _, expected = train(settings)
    assert len(ours) == len(pefts) == settings.max_steps and result.log == expected.log
    assert all(torch.equal(*pair) and pair[0].any() for pair in zip(ours, pefts, strict=True))
