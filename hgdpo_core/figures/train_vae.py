"""The VAE of the figures world: 64 x 64 pixels to 8 x 8 x 4 latents, as Stable Diffusion's but 80 times
smaller."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from torch import Tensor, nn

from .dataset import HELD_OUT_SEED, render_batch, sample_figures, to_model_range
from .loop import Plan, in_batches, train

PLAN = Plan(steps=3000, batch=16, learning_rate=2e-3)

# A limb covers few pixels: with equal weights the VAE spends itself on backgrounds and the limbs blur.
FIGURE_WEIGHT = 6.0
KL_WEIGHT = 1e-6
EDGE_WEIGHT = 0.5


def new_vae() -> AutoencoderKL:
    """An untrained AutoencoderKL with 0.98 million parameters."""
    return AutoencoderKL(
        sample_size=64,
        latent_channels=4,
        # diffusers declares these as tuples of one element.
        block_out_channels=cast(Any, (16, 32, 64, 64)),
        down_block_types=cast(Any, ("DownEncoderBlock2D",) * 4),
        up_block_types=cast(Any, ("UpDecoderBlock2D",) * 4),
        layers_per_block=1,
        norm_num_groups=8,
    )


def edge_error(difference: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical gradients: what a blurred contour gets wrong."""
    across = (difference[..., 1:] - difference[..., :-1]).abs() * weight[..., 1:]
    down = (difference[..., 1:, :] - difference[..., :-1, :]).abs() * weight[..., 1:, :]
    return across.mean() + down.mean()


def vae_loss(vae: AutoencoderKL, images: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """L1 + L2 + edges, the person's pixels weighted, plus a small KL. Images in [-1, 1], mask `[B,1,H,W]` in
    0..1."""
    posterior = cast(AutoencoderKLOutput, vae.encode(images)).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    decoded = cast(Tensor, vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0])  # type: ignore
    difference = decoded.float() - images
    weight = 1 + (FIGURE_WEIGHT - 1) * mask
    weight = weight / weight.mean()
    pixels = ((difference.abs() + 2 * difference.square()) * weight).mean()
    return pixels + EDGE_WEIGHT * edge_error(difference, weight) + KL_WEIGHT * posterior.kl().float().mean()


def train_vae(folder: Path, plan: Plan, *, measured: int, seed: int, checkpoint: Path) -> None:
    """Train the VAE on freshly drawn pictures and write it as a diffusers folder in fp16; `measured` pictures
    decide its scaling factor."""
    torch.manual_seed(seed)
    vae = new_vae()

    def loss_of(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        figures = sample_figures("train", plan.batch, rng)
        images, masks = render_batch(figures, rng.integers(2**32, size=plan.batch).tolist())
        mask = torch.from_numpy(masks)[:, None].float() / 255
        return vae_loss(vae, to_model_range(images), mask, generator)

    average = cast(AutoencoderKL, train(vae, loss_of, plan, name="vae", seed=seed, checkpoint=checkpoint))
    average.register_to_config(scaling_factor=measure_scaling_factor(average, measured))
    cast(AutoencoderKL, nn.Module.half(average)).save_pretrained(folder)


def measure_scaling_factor(vae: AutoencoderKL, count: int) -> float:
    """1 / standard deviation of the latents, so that scaled latents have unit deviation as the scheduler
    expects."""
    figures = sample_figures("train", count, np.random.default_rng(HELD_OUT_SEED))
    images, _ = render_batch(figures, range(HELD_OUT_SEED, HELD_OUT_SEED + count))
    return round(1 / float(encode(vae, images, name="latent scale").std()), 5)


def load_vae(folder: Path) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(folder)
    return cast(AutoencoderKL, cast(nn.Module, vae).eval().requires_grad_(False))


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, *, name: str, batch: int = 64) -> Tensor:
    """The posterior means, unscaled, float32 `[B,4,8,8]`, of uint8 pictures `[B,64,64,3]`."""
    means = []
    for part in in_batches(len(images), batch, name):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = cast(AutoencoderKLOutput, vae.encode(to_model_range(images[part]))).latent_dist
        means.append(posterior.mean.float())
    # The convolutions may answer in channels-last order, which slows everything that reads it.
    return torch.cat(means).contiguous()


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures `[B,3,64,64]`, about [-1, 1], float32, of unscaled latents."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded = vae.decode(latents, return_dict=False)[0]  # type: ignore
    return cast(Tensor, decoded).float().contiguous()


def psnr(images: Tensor, decoded: Tensor, weight: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over `weight` `[B,1,H,W]`; images in [-1, 1], `[B,3,H,W]`."""
    error = (F.hardtanh(decoded) - images).square().mean(1, keepdim=True)
    return float(10 * torch.log10(4 * weight.sum() / (error * weight).sum()))
