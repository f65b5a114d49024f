"""Precisions of DPO training: PEFT's input cast off changes no bit, and bf16 without autocast stays close to float32.

The latter on the built-in target's UNet, with the settings of its preset and drawings with and without a missing limb.
"""

import copy
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny import SD15, tiny_unet, trainable
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_cases import Pairs, config, train

from hgdpo_core.built_in import SOURCE
from hgdpo_core.config import TargetConfig
from hgdpo_core.config.base import apply_overrides
from hgdpo_core.config.presets import figures
from hgdpo_core.errors import ConfigError
from hgdpo_core.figures import caption
from hgdpo_core.figures.dataset import render_batch, sample_figures, to_model_range
from hgdpo_core.losses import step_coefficient
from hgdpo_core.models import find_model, load_backbone
from hgdpo_core.models.ddpm import DdpmSchedule
from hgdpo_core.models.lora import lora_state
from hgdpo_core.models.sd15 import UnetDenoiser
from hgdpo_core.training import dpo, lora
from hgdpo_core.training.base import Hooks
from hgdpo_core.training.loop import run_training

PURE = {"mixed_precision": "bf16", "autocast": False}
STEPS = 8


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
    monkeypatch.setattr(lora, "cast_lora_weights", lambda network: None)
    with kept_gradients() as pefts:
        _, expected = train(settings)
    assert len(ours) == len(pefts) == settings.max_steps and result.log == expected.log
    assert all(torch.equal(*pair) and pair[0].any() for pair in zip(ours, pefts, strict=True))


# -- bf16 without autocast


class Drawings(Pairs):
    """Latents of drawings in memory; losers lack a limb."""

    def __init__(self, backbone, size=8):
        drawn = sample_figures("train", size, np.random.default_rng(0))
        images = [render_batch(drawn, range(size), [defect] * size)[0] for defect in (None, "missing_limb")]
        self.winners, self.losers = (backbone.codec.encode(to_model_range(pixels)) for pixels in images)
        self.embeds = backbone.text.encode_captions([caption(figure) for figure in drawn]).embeds
        self.mirrored = torch.stack([self.winners, self.losers])  # unused: nothing flips


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(find_model(TargetConfig(source=SOURCE, dtype="float32")))


@pytest.fixture(scope="module")
def train_drawings(backbone):
    """A function that trains a LoRA, from a state or a new one: (its state, the log, the gradients)."""
    pairs = Drawings(backbone)

    def train(state=None, **settings):
        settings = figures().dpo.model_copy(update={"batch_size": 2, "warmup_steps": 0, "optimizer": "adamw",
                                                    "max_grad_norm": 1e9, **settings})
        denoiser = UnetDenoiser(copy.deepcopy(backbone.denoiser.network))
        objective = dpo.prepare_dpo(denoiser, DdpmSchedule(backbone.schedule.config), settings)
        if state is not None:
            objective.load_weights(state)
        with kept_gradients() as gradients:
            log = run_training(objective, pairs, settings, None, Hooks()).log
        return lora_state(denoiser.network), log, gradients

    return train


@pytest.fixture(scope="module")
def in_float32(train_drawings):
    return train_drawings(mixed_precision="no", max_steps=STEPS)


def test_losses_and_gradients_are_as_close_to_float32_as_those_of_autocast(cuda, train_drawings, in_float32):
    """Of a trained LoRA under other noise; on a pretended GPU, for a CPU's autocast keeps no norm in float32.

    beta multiplies what the margins differ by, so one step tells little. Measured with ten seeds, on a CPU with AMX:
    margins differ from float32's by up to 6e-4 (autocast's own: 5e-4), gradients by 0.04 to 0.37 of their norm, 0.14 on
    average (autocast's: 0.04 to 0.28, 0.12).
    """
    differences = []
    for seed in range(4, 8):
        rows, gradients = {}, {}
        for name, precision in (("float32", {"mixed_precision": "no"}), ("autocast", {"mixed_precision": "bf16"}),
                                ("pure", PURE)):
            _, (rows[name],), (gradients[name],) = train_drawings(in_float32[0], max_steps=1, seed=seed, **precision)
        for name, tolerance in (("winner_error", 0.01), ("loser_error", 0.01), ("stat_loss", 0.15)):
            assert rows["pure"][name] == pytest.approx(rows["float32"][name], rel=tolerance)
        assert rows["pure"]["margin"] == pytest.approx(rows["float32"]["margin"], abs=1e-3)
        cosine, difference = compare(gradients["pure"], gradients["float32"])
        assert cosine > 0.9, (seed, cosine)
        differences.append((difference, compare(gradients["autocast"], gradients["float32"])[1]))
    pure, of_autocast = np.mean(differences, axis=0)
    assert pure < 0.3 and pure < 2 * of_autocast, differences


def test_a_training_follows_that_in_float32(train_drawings, in_float32, monkeypatch):
    """Measured: the first gradient differs by 0.035 of its norm, losses by 0.02 on average, B by 0.08 in the end."""
    calls, pair_losses = [], dpo.pair_losses

    def kept_losses(*inputs):
        calls.append((*inputs, pair_losses(*inputs)))
        return calls[-1][-1]

    monkeypatch.setattr(dpo, "pair_losses", kept_losses)
    state, log, gradients = train_drawings(max_steps=STEPS, **PURE)
    expected_state, expected, expected_gradients = in_float32
    assert len(calls) == STEPS
    for call in calls:
        check_losses(*call)
    assert (log[0]["dpo_loss"], log[0]["margin"], log[0]["stat_loss"]) == (np.float32(math.log(2)), 0, 0)
    cosine, difference = compare(gradients[0], expected_gradients[0])
    assert cosine > 0.998 and difference < 0.06, (cosine, difference)
    assert np.mean([abs(row["loss"] - other["loss"]) for row, other in zip(log, expected, strict=True)]) < 0.1
    cosine, difference = compare(*(torch.cat([tensor.flatten() for name, tensor in lora.items() if "lora_B" in name])
                                   for lora in (state, expected_state)))
    assert cosine > 0.99 and difference < 0.2, (cosine, difference)
    assert all(fraction_of_bf16(tensor) < 0.05 for tensor in state.values())


def compare(tensor, expected):
    """Cosine, and the norm of the difference relative to that of what is expected."""
    return (torch.cosine_similarity(tensor, expected, dim=0).item(),
            ((tensor - expected).norm() / expected.norm()).item())


def fraction_of_bf16(tensor):
    """How many of its numbers bf16 could hold: all, where something was rounded to it."""
    return (tensor.bfloat16() == tensor).float().mean()


def check_losses(policy, reference, target, timesteps, schedule, settings, made):
    """The network is in bf16 and nothing else: the losses are those that float64 makes of its predictions."""
    assert fraction_of_bf16(policy) == fraction_of_bf16(reference) == 1 and fraction_of_bf16(target) < 0.05
    policy, reference, target = (tensor.detach().cpu().double() for tensor in (policy, reference, target))
    winner, loser = ((policy - target).square() - (reference - target).square()).mean((1, 2, 3)).chunk(2)
    means = (reference - policy).mean((2, 3)).chunk(2)[0] * step_coefficient(timesteps, schedule.chain)[:, None]
    expected = {"margin": winner - loser, "dpo_loss": torch.nn.functional.softplus(settings.beta * (winner - loser)),
                "stat_loss": means.square().sum(1)}
    for name, tolerance in (("margin", 1e-6), ("dpo_loss", 1e-3), ("stat_loss", 1e-12)):
        assert made[name].dtype == torch.float32
        torch.testing.assert_close(made[name].detach().cpu().double(), expected[name], rtol=1e-3, atol=tolerance)
    assert fraction_of_bf16(made["winner_error"].detach()) < 1


def test_the_lora_computes_in_bf16_and_stays_float32():
    """PEFT's cast would compute it in float32, and keep float32 copies of what it reads."""
    unet, seen, settings = tiny_unet(), set(), config(max_steps=1, **PURE)

    def see(_, inputs):
        seen.add((inputs[0].dtype, torch.is_autocast_enabled(inputs[0].device.type)))

    objective = dpo.prepare_dpo(*trainable(unet, SD15), settings)
    for name, module in unet.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            module.register_forward_pre_hook(see)
    run_training(objective, Pairs(), settings, None, Hooks())
    assert seen == {(torch.bfloat16, False)}
    assert {(p.requires_grad, p.dtype) for p in unet.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("precision", ["auto", "no", "fp16"])
def test_it_is_refused_where_it_would_not_be_bf16(precision):
    with pytest.raises(ConfigError, match=f"mixed_precision is {precision}: set that to bf16, or autocast to true"):
        apply_overrides(figures(), {"dpo.autocast": False, "dpo.mixed_precision": precision})
    with pytest.raises(ConfigError, match="'sft.autocast' is not a setting"):
        apply_overrides(figures(), {"sft.autocast": False})


def test_ids_name_it_only_where_autocast_is_off():
    for of in ("result", "run"):
        assert "autocast" not in config(mixed_precision="bf16").identity(of)
        assert config(**PURE).identity(of)["autocast"] is False
