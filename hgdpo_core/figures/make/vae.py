"""The VAE of the figures setting: 64 x 64 pixels to 8 x 8 x 8 latents, as Stable Diffusion's but 80 times smaller.

Stable Diffusion 1.5 has 4 latent channels; its images have 4 096 latent positions and these have 64, too few for hands
and faces in 4 channels (24.2 dB were reached). Twice the channels cost the UNet next to nothing, twice the resolution
would cost it four times as much.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from safetensors.torch import load_file
from torch import Tensor, nn

from ..dataset import HELD_OUT_SEED, render_batch, sample_figures, to_model_range
from .loop import Plan, fast_autocast, in_batches, save_tensors, train

PLAN = Plan(steps=9000, batch=16, learning_rate=2e-3)
IMAGES = 24000

# A limb covers few pixels: with equal weights the loss is mostly about backgrounds, and the limbs blur.
FIGURE_WEIGHT = 4.0
LATENT_CHANNELS = 8
KL_WEIGHT = 1e-6
EDGE_WEIGHT = 0.5


def new_vae() -> AutoencoderKL:
    """An untrained AutoencoderKL with 0.98 million parameters."""
    # diffusers declares these as tuples of one element.
    blocks: dict[str, Any] = dict(block_out_channels=(16, 32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4,
                                  up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1)
    return AutoencoderKL(sample_size=64, latent_channels=LATENT_CHANNELS, norm_num_groups=8, **blocks)


def edge_error(difference: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical gradients: what a blurred contour gets wrong."""
    across = (difference[..., 1:] - difference[..., :-1]).abs() * weight[..., 1:]
    down = (difference[..., 1:, :] - difference[..., :-1, :]).abs() * weight[..., 1:, :]
    return across.mean() + down.mean()


def vae_loss(vae: AutoencoderKL, images: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """L1 + 4 L2 + edges, the person's pixels weighted, plus a small KL. Images in [-1, 1], mask `[B,1,H,W]` in 0..1."""
    posterior = cast(AutoencoderKLOutput, vae.encode(images)).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    decoded = cast(Tensor, vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0])  # type: ignore
    difference = decoded.float() - images
    weight = 1 + (FIGURE_WEIGHT - 1) * mask
    weight = weight / weight.mean()
    pixels = ((difference.abs() + 4 * difference.square()) * weight).mean()
    return pixels + EDGE_WEIGHT * edge_error(difference, weight) + KL_WEIGHT * posterior.kl().float().mean()


def render_images(count: int, *, seed: int, path: Path) -> tuple[Tensor, Tensor]:
    """uint8 images `[N,64,64,3]` of the train split and the masks of their people `[N,64,64]`; cached in `path`.

    Rendering an image takes as long as half a training step on it, so they are rendered once.
    """
    if not path.exists():
        rng = np.random.default_rng([seed, 66])
        figures, seeds = sample_figures("train", count, rng), rng.integers(2**32, size=count).tolist()
        parts = [render_batch(figures[p], seeds[p]) for p in in_batches(count, 256, "vae: render")]
        images, masks = (torch.from_numpy(np.concatenate(list(kind))) for kind in zip(*parts, strict=True))
        save_tensors(path, {"images": images, "masks": masks})
    tensors = load_file(path)
    return tensors["images"], tensors["masks"]


def train_vae(folder: Path, plan: Plan, *, images: int, measured: int, seed: int, work: Path) -> None:
    """Train the VAE on rendered images and write it as a diffusers folder in fp16; `measured` further images decide its
    scaling factor."""
    rendered, masks = render_images(images, seed=seed, path=work / "vae-pictures.safetensors")
    torch.manual_seed(seed)
    vae = new_vae()

    def loss_of(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        chosen = torch.from_numpy(rng.integers(len(rendered), size=plan.batch))
        mirrored = torch.from_numpy(rng.random(plan.batch) < 0.5)[:, None, None, None]
        batch, mask = to_model_range(rendered[chosen].numpy()), masks[chosen][:, None].float() / 255
        batch, mask = (torch.where(mirrored, part.flip(-1), part) for part in (batch, mask))
        return vae_loss(vae, batch, mask, generator)

    average = train(vae, loss_of, plan, name="vae", seed=seed, checkpoint=work / "checkpoint.pt")
    average.register_to_config(scaling_factor=measure_scaling_factor(average, measured))
    cast(AutoencoderKL, nn.Module.half(average)).save_pretrained(folder)


def measure_scaling_factor(vae: AutoencoderKL, count: int) -> float:
    """1 / standard deviation of the latents, so that scaled latents have unit deviation as the scheduler expects."""
    figures = sample_figures("train", count, np.random.default_rng(HELD_OUT_SEED))
    images, _ = render_batch(figures, range(HELD_OUT_SEED, HELD_OUT_SEED + count))
    return round(1 / float(encode(vae, images, name="latent scale").std()), 5)


def load_vae(folder: Path) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(folder)
    return cast(AutoencoderKL, cast(nn.Module, vae).eval().requires_grad_(False))


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, *, name: str, batch: int = 64) -> Tensor:
    """The posterior means, unscaled, float32 `[B,8,8,8]`, of uint8 images `[B,64,64,3]`."""
    means = []
    for part in in_batches(len(images), batch, name):
        with fast_autocast():
            posterior = cast(AutoencoderKLOutput, vae.encode(to_model_range(images[part]))).latent_dist
        means.append(posterior.mean.float())
    # The convolutions may return channels-last order, which slows everything that reads it.
    return torch.cat(means).contiguous()


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images `[B,3,64,64]`, about [-1, 1], float32, of unscaled latents."""
    with fast_autocast():
        decoded = vae.decode(latents, return_dict=False)[0]  # type: ignore
    return cast(Tensor, decoded).float().contiguous()


def psnr(images: Tensor, decoded: Tensor, weight: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over `weight` `[B,1,H,W]`; images in [-1, 1], `[B,3,H,W]`."""
    error = (F.hardtanh(decoded) - images).square().mean(1, keepdim=True)
    return float(10 * torch.log10(4 * weight.sum() / (error * weight).sum()))
