"""A timed probe of a training: a few steps on noise on this machine's device, thrown away."""

import time
from collections.abc import Sequence

import torch

from hgdpo_core.config import DpoConfig, SftConfig
from hgdpo_core.memory import free_memory
from hgdpo_core.models import Conditioning, Model, default_device, load_backbone
from hgdpo_core.training import epoch_order
from hgdpo_core.training.data import ImageBatch, PairBatch
from hgdpo_core.training.dpo import train_dpo
from hgdpo_core.training.sft import train_sft

STEPS = 3


def step_seconds(model: Model, config: DpoConfig | SftConfig, size: tuple[int, int]) -> float:
    """Seconds of one optimizer step on noise: the later ones of a few, in memory, without a checkpoint."""
    free_memory()
    backbone = load_backbone(model, default_device(), dtype="float32")
    shapes = backbone.shapes(size)
    moments: list[float] = []
    config = config.model_copy(update={"max_steps": STEPS, "flip": False})  # flips cost when latents are made

    def clock(done: int, total: int, unit: str) -> None:
        moments.append(time.monotonic())

    latents, embeds = tuple(shapes["latent_shape"]), tuple(shapes["embeds_shape"])
    if isinstance(config, DpoConfig):
        train_dpo(backbone.denoiser, backbone.schedule, _NoisePairs(latents, embeds), config, checkpoints=None,
                  progress=clock)
    else:
        train_sft(backbone.denoiser, backbone.schedule, _NoiseImages(latents, embeds), config,
                  Conditioning(torch.zeros(1, *embeds)), checkpoints=None, progress=clock)
    return (moments[-1] - moments[1]) / (STEPS - 1)  # the first moment is before, the second after the first step


class _Noise:
    """Endless random samples."""

    def __init__(self, latent_shape: tuple[int, ...], embeds_shape: tuple[int, ...]):
        self.latent_shape, self.embeds_shape = latent_shape, embeds_shape

    def __len__(self) -> int:
        return 1024

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        return epoch_order(len(self), seed, epoch)


class _NoisePairs(_Noise):
    def batch(self, indices: Sequence[int]) -> PairBatch:
        count = len(indices)
        return PairBatch(torch.randn(count, *self.latent_shape), torch.randn(count, *self.latent_shape),
                         torch.randn(count, *self.embeds_shape))


class _NoiseImages(_Noise):
    def batch(self, indices: Sequence[int]) -> ImageBatch:
        return ImageBatch(torch.randn(len(indices), *self.latent_shape),
                          torch.randn(len(indices), *self.embeds_shape))
