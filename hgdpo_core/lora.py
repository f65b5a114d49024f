"""The policy: the target's UNet wearing a LoRA. With the LoRA off, the same network is the reference."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

from hgdpo_core.errors import ModelError

ATTENTION_LINEARS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(unet: UNet2DConditionModel, rank: int, seed: int) -> None:
    """Give every linear layer of the UNet's attention modules a LoRA of `rank`, and freeze the rest.

    Scale 1 (lora_alpha = rank: every export assumes it), gaussian A and zero B, so that policy and reference
    are equal before training; LoRA weights are float32 whatever the UNet's dtype. The start depends only on
    `seed`; nobody else's random numbers move. ModelError when the UNet already wears an adapter.
    """
    if getattr(unet, "peft_config", None):
        raise ModelError(f"the UNet already wears the adapters {', '.join(unet.peft_config)}: "
                         "merge them into the weights first, or load a fresh UNet")
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # peft draws A on the CPU
        torch.default_generator.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                    target_modules=list(ATTENTION_LINEARS)))
    cast_training_params(unet, dtype=torch.float32)


@contextmanager
def reference_mode(unet: UNet2DConditionModel) -> Iterator[None]:
    """Inside, `unet` is the reference: its LoRA is off and nothing is recorded for gradients.

    Leave before the policy's own forward pass: switching adapters also switches their requires_grad.
    """
    unet.disable_adapters()
    try:
        with torch.no_grad():
            yield
    finally:
        unet.enable_adapters()


def lora_state(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The LoRA's weights by name, `<layer>.lora_A.weight` and `.lora_B.weight`: float32, on the CPU."""
    state = get_peft_model_state_dict(unet)
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in state.items()}


def load_lora_state(unet: UNet2DConditionModel, state: Mapping[str, torch.Tensor]) -> None:
    """Put an earlier `lora_state` into a UNet that `add_lora` prepared; ModelError if it does not fit."""
    expected = {name: list(tensor.shape) for name, tensor in lora_state(unet).items()}
    given = {name: list(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
    if wrong:
        name = wrong[0]
        raise ModelError(f"LoRA weights do not fit the UNet in {len(wrong)} places: {name} is "
                         f"{given.get(name, 'missing')}, expected {expected.get(name, 'no such layer')}; "
                         "use the UNet and the rank they were made with")
    set_peft_model_state_dict(unet, dict(state))


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write `folder/pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(folder)` opens.

    No alpha is stored: alpha = rank is what loaders assume then.
    """
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers={**lora_state(unet)})
