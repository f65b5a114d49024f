"""Memory of each stage by the counts of tensors without numbers: what `hgdpo_core/plan/memory.py` is made of.

    python -m benchmarks.memory --families sd15 sdxl

The real networks at the preset's size run forwards and backwards on fake tensors, with one image and with two: the
difference is what an image takes, the rest what the networks take. Counted is the peak of all living storages; a GPU
adds its libraries' workspaces, its context and fragmentation. Attention counts as the fused kernels compute it, which
hold no scores; norms give float32 under autocast, as on a GPU. The state of an optimizer is not here: it is arithmetic.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.alignprop_memory import GIB, LivingBytes, make_fake
from hgdpo_core.config import DpoConfig
from hgdpo_core.config.presets import build_config
from hgdpo_core.models.backbone import FAMILIES, Conditioning
from hgdpo_core.models.networks import empty_network
from hgdpo_core.models.sd15 import UnetDenoiser
from hgdpo_core.models.sdxl import SdxlDenoiser
from hgdpo_core.training.lora import put_lora

DENOISERS: dict[str, Callable[[Any], UnetDenoiser]] = {
    "sd15": UnetDenoiser, "sdxl": lambda network: SdxlDenoiser(network, 8)}
TOKENS = 77
Size = tuple[int, int]


def network(family: str, part: str, dtype: torch.dtype) -> Any:
    """A network of a family on the meta device."""
    found: Any = FAMILIES[family]
    configs = found.configs
    return empty_network(configs, part, json.loads((configs / part / "config.json").read_text())).to(dtype)


def conditioning(family: str, unet: Any, images: int, dtype: torch.dtype) -> Conditioning:
    """Of texts of one chunk."""
    embeds = torch.empty(images, TOKENS, unet.config.cross_attention_dim, dtype=dtype)
    return Conditioning(embeds, pooled=torch.empty(images, 1280, dtype=dtype) if family == "sdxl" else None)


@contextmanager
def norms_as_on_a_gpu() -> Iterator[None]:
    """Under autocast norms compute in float32 and leave their results so, which the CPU's autocast does not."""
    def in_float32(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def computed(*args: Any, **kwargs: Any) -> torch.Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return norm(*args, **kwargs)
            with torch.autocast("cpu", enabled=False):
                return norm(*(arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args), **kwargs)
        return computed

    with ExitStack() as stack:
        for name in ("group_norm", "layer_norm"):
            stack.enter_context(mock.patch.object(F, name, in_float32(getattr(F, name))))
        yield


def denoise(family: str, denoiser: UnetDenoiser, size: Size, images: int, dtype: torch.dtype) -> torch.Tensor:
    latents = torch.empty(images, 4, size[1] // 8, size[0] // 8, dtype=dtype)
    timesteps = torch.empty(images, dtype=torch.long)
    return denoiser(latents, timesteps, conditioning(family, denoiser.network, images, dtype))


def sampling(family: str, size: Size, images: int) -> tuple[int, int]:
    """A step of sampling with guidance, in bfloat16."""
    denoiser = DENOISERS[family](network(family, "unet", torch.bfloat16))
    return counted(denoiser, lambda: denoise(family, denoiser, size, 2 * images, torch.bfloat16))


def decoding(family: str, size: Size, images: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    vae = network(family, "vae", dtype)
    latents = images, 4, size[1] // 8, size[0] // 8
    return counted(vae, lambda: vae.decode(torch.empty(latents, dtype=dtype), return_dict=False))


def encoding(family: str, size: Size, images: int) -> tuple[int, int]:
    vae = network(family, "vae", torch.float32)
    return counted(vae, lambda: vae.encode(torch.empty(images, 3, size[1], size[0]), return_dict=False))


def tuning(family: str, size: Size, images: int, *, checkpointing: bool = True) -> tuple[int, int]:
    """A step of SFT: all weights in float32, bf16 autocast; gradients are counted."""
    denoiser = DENOISERS[family](network(family, "unet", torch.float32).requires_grad_(True))
    return counted(denoiser, lambda: backward(family, denoiser, size, images), checkpointing=checkpointing, grad=True)


def preferring(family: str, size: Size, pairs: int, *, checkpointing: bool = True) -> tuple[int, int]:
    """A step of DPO: frozen weights in bf16, a LoRA in float32, the reference's pass and the policy's, two images each.
    """
    denoiser = DENOISERS[family](network(family, "unet", torch.float32))
    put_lora(denoiser, DpoConfig(batch_size=1, learning_rate=1e-5, mixed_precision="bf16"))

    def step() -> None:
        denoiser.network.disable_adapters()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            reference = denoise(family, denoiser, size, 2 * pairs, torch.float32)
        denoiser.network.enable_adapters()
        backward(family, denoiser, size, 2 * pairs)
        del reference

    return counted(denoiser, step, checkpointing=checkpointing, grad=True)


def backward(family: str, denoiser: UnetDenoiser, size: Size, images: int) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        prediction = denoise(family, denoiser, size, images, torch.float32)
    prediction.float().square().mean().backward()


def counted(part: nn.Module, run: Callable[[], object], *, checkpointing: bool = False,
            grad: bool = False) -> tuple[int, int]:
    """Bytes of a network, and the peak of a run of it."""
    if checkpointing:
        part.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    part.train(False)
    with norms_as_on_a_gpu(), FakeTensorMode(), LivingBytes() as living, torch.set_grad_enabled(grad):
        make_fake(part)
        weights = living.now
        run()
        return weights, living.peak


STAGES: dict[str, Callable[..., tuple[int, int]]] = {
    "sampling": sampling, "decoding": decoding,
    "decoding in float32": lambda *args: decoding(*args, dtype=torch.float32), "encoding": encoding,
    "sft": tuning, "sft without checkpoints": lambda *args: tuning(*args, checkpointing=False),
    "dpo": preferring, "dpo without checkpoints": lambda *args: preferring(*args, checkpointing=False)}


def rows(families: Sequence[str], stages: Sequence[str], size: Size | None) -> Iterator[str]:
    """The lines of a Markdown table, each as it is known."""
    yield ("| family | pixels | stage | weights, GiB | beside them, GiB | each image or pair, GiB | bytes per pixel |\n"
           "|---|---|---|---|---|---|---|")
    for family in families:
        sampler = build_config(family, target="t", prompts="p").sampler
        pixels = size or (sampler.width, sampler.height)
        for stage in stages:
            (weights, one), (_, two) = (STAGES[stage](family, pixels, images) for images in (1, 2))
            each = two - one
            yield (f"| {family} | {pixels[0]}x{pixels[1]} | {stage} | {weights / GIB:.2f} | "
                   f"{(one - each - weights) / GIB:.2f} | {each / GIB:.3f} | {each / pixels[0] / pixels[1]:.0f} |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", default=list(DENOISERS), choices=list(DENOISERS))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--size", help="width x height in pixels; default: the preset's")
    options = parser.parse_args(arguments)
    width, _, height = (options.size or "").partition("x")
    size = (int(width), int(height)) if options.size else None
    for row in rows(options.families, options.stages, size):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
