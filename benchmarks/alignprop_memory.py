"""Memory of an AlignProp step on Stable Diffusion 1.5, without running one: tensors without numbers are counted.

    python -m benchmarks.alignprop_memory --sizes 512x512 704x1024

The real networks (UNet, AutoencoderKL, PickScore's ViT-H/14) are built and run forwards and backwards on fake tensors,
as the training runs them: LoRA, bf16 autocast, PickScore in float32. What is counted is the peak of all living storages
at once, of weights and of activations; a GPU adds its libraries' workspaces and fragmentation. Attention is counted as
the fused kernels compute it, which hold no scores.
"""

import argparse
import itertools
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.targets import NARROW
from hgdpo_core.config import LoraConfig
from hgdpo_core.models import Conditioning
from hgdpo_core.models.files import SD15_CONFIGS
from hgdpo_core.models.sampling import sample_with_gradient
from hgdpo_core.models.sd15 import KlCodec, UnetDenoiser
from hgdpo_core.scorers.pixels import crop_tensor, floor_half, normalise_pixels
from hgdpo_core.training.lora import put_lora

GIB = 2**30
VIT_H: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 224, "projection_dim": 1024}
NARROW_VIT: dict[str, Any] = {
    **VIT_H, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT_TOWER_BYTES = 4 * 354_000_000  # of PickScore, in float32: its weights stay loaded
TOKENS = 77
CHECKPOINTS = {"steps": False, "steps and blocks": True}
"""What is computed again in the backward pass: a sampling step always is, a block of the UNet by the setting
`alignprop.gradient_checkpointing`."""


@dataclass
class LivingBytes(TorchDispatchMode):
    """Inside, counts the bytes of all storages that live at once, and their peak."""

    now: int = 0
    peak: int = 0
    _seen: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_iter(results):
            if isinstance(result, torch.Tensor):
                self.add(result)
        return results

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until nothing refers to it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._seen.pop(key)


class Steps:
    """Stands for a solver: its coefficients, which are numbers, cannot be fake."""

    init_noise_sigma = 1.0
    timesteps: Sequence[int] = ()

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = range(steps)

    def scale_model_input(self, latents: torch.Tensor, timestep: int) -> torch.Tensor:
        return latents

    def step(self, prediction: torch.Tensor, timestep: int, latents: torch.Tensor,
             **options: Any) -> tuple[torch.Tensor]:
        return (1.01 * latents - 0.1 * prediction,)


@dataclass
class Networks:
    """What an AlignProp step computes with."""

    denoiser: UnetDenoiser
    codec: KlCodec
    reward: Any


def build(narrow: bool) -> Networks:
    """SD 1.5 with a LoRA of rank 8 and PickScore's image tower; `narrow`: few channels, to see that it runs."""
    def part(kind: Any, name: str) -> Any:
        changes = NARROW[name] if narrow else {}
        return kind.from_config({**kind.load_config(SD15_CONFIGS, subfolder=name), **changes}).requires_grad_(False)

    denoiser = UnetDenoiser(part(UNet2DConditionModel, "unet"))
    put_lora(denoiser, LoraConfig(batch_size=1, learning_rate=1e-3, mixed_precision="bf16"))
    vae: Any = part(AutoencoderKL, "vae")
    reward: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**(NARROW_VIT if narrow else VIT_H)))
    return Networks(denoiser, KlCodec(vae.eval(), 8, SD15_CONFIGS), reward.eval().requires_grad_(False))


def step_bytes(size: tuple[int, int], images: int, live_steps: int, *,
               gradient_checkpointing: bool, narrow: bool = False) -> tuple[int, int]:
    """Bytes of the weights, and the peak of a step of so many images of (width, height) pixels at once."""
    with torch.device("meta"):
        networks = build(narrow)
    if gradient_checkpointing:
        networks.denoiser.enable_gradient_checkpointing()
    with FakeTensorMode(), LivingBytes() as living:
        for part in (networks.denoiser, networks.codec.vae, networks.reward):
            make_fake(part)
        weights = living.now
        _step(networks, size, images, live_steps)
        return weights, living.peak


def make_fake(network: nn.Module) -> None:
    """Give a network of the meta device fake weights and buffers on the CPU, in place; inside a FakeTensorMode."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _step(networks: Networks, size: tuple[int, int], images: int, live_steps: int) -> None:
    width: Any = networks.denoiser.network.config.cross_attention_dim
    prompts, negative = (Conditioning(torch.randn(count, TOKENS, width)) for count in (images, 1))
    noise = torch.randn(images, 4, size[1] // 8, size[0] // 8)
    autocast = torch.autocast("cpu", torch.bfloat16)

    def denoise(noisy: torch.Tensor, timestep: Any, conditioning: Conditioning) -> torch.Tensor:
        with autocast:
            return networks.denoiser(noisy, timestep, conditioning).float()

    solver: Any = Steps()
    latents = sample_with_gradient(denoise, solver, prompts, negative, noise, steps=live_steps, guidance_scale=5.0,
                                   live_steps=live_steps)
    pixels = (networks.codec.decode_with_gradient(latents) / 2 + 0.5).clamp(0, 1)
    seen = normalise_pixels(crop_tensor(pixels, VIT_H["image_size"], halve=floor_half), torch.float32)
    networks.reward(pixel_values=seen).image_embeds.sum().backward()


def rows(sizes: Sequence[tuple[int, int]], images: int, steps: Sequence[int], checkpoints: Sequence[str],
         narrow: bool) -> Iterator[str]:
    """The lines of a Markdown table of the peaks, the text tower of PickScore added, each as it is known."""
    yield "| pixels | images at once | live steps | checkpoints | weights | peak |\n|---|---|---|---|---|---|"
    for size, live, name in itertools.product(sizes, steps, checkpoints):
        weights, peak = (count + (0 if narrow else TEXT_TOWER_BYTES) for count in step_bytes(
            size, images, live, gradient_checkpointing=CHECKPOINTS[name], narrow=narrow))
        unit, short = (2**20, "MiB") if narrow else (GIB, "GiB")
        yield (f"| {size[0]}x{size[1]} | {images} | {live} | {name} | {weights / unit:.2f} {short} | "
               f"{peak / unit:.2f} {short} |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["512x512", "704x1024"], help="width x height in pixels")
    parser.add_argument("--images", type=int, default=1, help="at once: the batch of a micro step")
    parser.add_argument("--live-steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--checkpoints", nargs="+", choices=list(CHECKPOINTS), default=list(CHECKPOINTS))
    parser.add_argument("--narrow", action="store_true", help="few channels, to see that it runs")
    options = parser.parse_args(arguments)
    sizes = [(int(width), int(height)) for width, height in (size.split("x") for size in options.sizes)]
    for row in rows(sizes, options.images, options.live_steps, options.checkpoints, options.narrow):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
