"""What objectives are made of: noise, flips, precision.

A sample has the same noise and timestep for any number of processes, any split into micro-batches, and after any
number of resumes (see `data.py`).
"""

from typing import Any, Literal

import torch
from torch import nn

from hgdpo_core.devices import cpu_has_fast_bfloat16, use_cpu
from hgdpo_core.errors import ConfigError

LogRow = dict[str, Any]
Precision = Literal["no", "bf16", "fp16"]
Generators = list[torch.Generator]
TENSOR_CORES = (7, 0)  # the compute capability from which GPUs multiply float16 in them


def draw_noise(generators: Generators, like: torch.Tensor) -> torch.Tensor:
    """Standard normal noise for each sample of `like` `[B,...]`; float32, drawn on the CPU, on its device."""
    noise = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
    return torch.stack(noise).to(like.device)


def draw_flips(generators: Generators) -> torch.Tensor:
    """Whether to mirror each sample, one half of the time; bool `[B]` on the CPU."""
    return torch.cat([torch.rand(1, generator=generator) for generator in generators]) < 0.5


def apply_flips(latents: torch.Tensor, mirrored: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """`latents` `[B,C,h,w]`, those of the mirrored images (not the mirrored latents) where `flips` `[B]` is True."""
    return torch.where(flips[:, None, None, None].to(latents.device), mirrored.to(latents.device), latents)


def resolve_precision(setting: str) -> Precision:
    """Mixed precision as accelerate names it; "auto" is bf16 where the machine multiplies it in hardware.

    A GPU that does not, but has tensor cores for float16 (V100, T4), trains in fp16: several times faster than in
    float32. ConfigError for a precision that the machine does not have: torch's emulation of bf16 is slower than none.
    """
    cuda = not use_cpu()
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else cpu_has_fast_bfloat16()
    if setting == "auto":
        if fast:
            return "bf16"
        return "fp16" if cuda and torch.cuda.get_device_capability() >= TENSOR_CORES else "no"
    if setting == "fp16" and not cuda:
        raise ConfigError("mixed_precision fp16 needs a CUDA GPU, and none is visible: use auto, bf16 or no")
    if setting == "bf16" and cuda and not fast:
        raise ConfigError(f"mixed_precision bf16 is only emulated on {torch.cuda.get_device_name()}: use auto, fp16 "
                          "or no")
    return setting  # pyright: ignore[reportReturnType]


def cast_frozen(module: nn.Module, precision: Precision) -> None:
    """Convert the weights that are not trained to the mixed precision, in place: half the memory, no cast per step."""
    if precision != "no":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        for parameter in module.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
