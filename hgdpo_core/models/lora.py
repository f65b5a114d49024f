"""The policy: the target's UNet with a LoRA applied. With the LoRA off, the same network is the reference."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.training_utils import cast_training_params
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear, LoraLayer
from safetensors.torch import save_file
from torch import nn

from hgdpo_core.errors import ModelError
from hgdpo_core.models.lora_files import read_notes
from hgdpo_core.models.weight_files import load_safetensors

ATTENTION_LINEARS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(unet: UNet2DConditionModel, rank: int, seed: int,
             targets: Sequence[str] = ATTENTION_LINEARS) -> None:
    """Give the `targets`, by default every linear layer of attention, a LoRA of `rank`, and freeze the rest.

    Scale 1 (lora_alpha = rank: every export assumes it), gaussian A and zero B, so that policy and reference
    are equal before training; LoRA weights are float32 whatever the UNet's dtype. The start depends only on
    `seed` and leaves torch's own generators as they were. ModelError when the UNet already has an adapter.
    """
    if getattr(unet, "peft_config", None):
        raise ModelError(f"the UNet already has the adapters {', '.join(unet.peft_config)}: "
                         "merge them into the weights first, or load a fresh UNet")
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # peft samples A on the CPU
        torch.default_generator.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                    target_modules=list(targets)))
    cast_training_params(unet, dtype=torch.float32)


class _CastLinear(nn.Linear):
    """Its weight is cast to the precision of what it reads; the weight and its gradient stay float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.to(input.dtype))


def cast_lora_weights(unet: UNet2DConditionModel) -> None:
    """From here on a linear layer's LoRA computes in the precision of its inputs, whose weights are cast to it.

    PEFT casts the inputs to float32 instead. They are far larger, and under autocast go back to half precision at
    once: the same bits for more work (tests/core/training/test_dpo_precision.py). Without autocast the LoRA would
    compute in float32, and each layer would keep a float32 copy of its inputs for the backward pass.
    """
    for layer in unet.modules():
        if isinstance(layer, Linear):
            layer.cast_input_dtype_enabled = False
            linear: Any
            for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
                linear.__class__ = _CastLinear  # in place: names, weights and PEFT's own references stay


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


@contextmanager
def lora_weight_set(unet: UNet2DConditionModel, weight: float) -> Iterator[None]:
    """Inside, the LoRA is applied at `weight`; after it at 1 again, as in training. No effect without a LoRA."""
    adapters = [(layer, name) for layer in unet.modules() if isinstance(layer, LoraLayer)
                for name in layer.active_adapters]
    for layer, name in adapters:
        layer.set_scale(name, weight)
    try:
        yield
    finally:
        for layer, name in adapters:
            layer.set_scale(name, 1.0)


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

    No alpha is stored: alpha = rank is what loaders assume then. ModelError for a LoRA with another alpha.
    """
    _refuse_other_scale((name, config.lora_alpha, config.r) for name, config in unet.peft_config.items())
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers={**lora_state(unet)})


def write_kohya_lora(source: Path, path: Path, *, original_names: bool = False) -> None:
    """A diffusers LoRA file again as `path`, with the key names that kohya's scripts, A1111 and ComfyUI read.

    `lora_unet_<layer>.lora_down.weight`, `.lora_up.weight` and `.alpha` = rank, the same numbers in the same
    precision; with `original_names` the layers are those of SDXL's original UNet, for A1111 reads no others of that
    family. ModelError for a LoRA whose alpha is not its rank: the converter writes alpha = rank whatever it was.
    """
    state, metadata = load_safetensors(source)
    notes = read_notes(source, metadata)
    ranks = {len(tensor) for name, tensor in state.items() if name.endswith(".lora_A.weight")}
    if not ranks:
        raise ModelError(f"{source} is not a LoRA as diffusers saves it: expected keys that end in .lora_A.weight")
    _refuse_other_scale((name, notes[f"{name}.lora_alpha"], notes[f"{name}.r"])
                        for name in ("unet", "text_encoder") if {f"{name}.lora_alpha", f"{name}.r"} <= notes.keys())
    _refuse_other_scale((name, float(tensor), max(ranks)) for name, tensor in state.items() if name.endswith(".alpha"))
    rank, state = str(max(ranks)), {name: tensor for name, tensor in state.items() if not name.endswith(".alpha")}
    state = {_original_name(name) if original_names else name: tensor for name, tensor in state.items()}
    save_file(convert_state_dict_to_kohya(state), path, metadata={
        "ss_base_model_version": "sdxl_base_v1-0" if original_names else "sd_v1", "ss_network_module": "networks.lora",
        "ss_network_dim": rank, "ss_network_alpha": rank})


def _original_name(name: str) -> str:
    """A layer of diffusers' SDXL UNet by its original name: `up_blocks.1.attentions.2` is `output_blocks.5.1`.

    Each of its blocks has three entries in the original lists; the first of `input_blocks` is the first convolution.
    """
    name = name.replace("mid_block.attentions.0.", "middle_block.1.")
    for blocks, original, first in (("down_blocks", "input_blocks", 1), ("up_blocks", "output_blocks", 0)):
        if found := re.match(rf"unet\.{blocks}\.(\d+)\.attentions\.(\d+)\.", name):
            number = 3 * int(found[1]) + int(found[2]) + first
            return f"unet.{original}.{number}.1.{name[found.end():]}"
    return name


def _refuse_other_scale(alphas: Iterable[tuple[str, float, int]]) -> None:
    for name, alpha, rank in alphas:
        if alpha != rank:
            raise ModelError(f"{name} has lora_alpha {alpha:g} at rank {rank}: a LoRA is exported only where "
                             "lora_alpha = rank; multiply its lora_B by alpha / rank first")
