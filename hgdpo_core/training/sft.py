"""Supervised fine-tuning of the whole network on the user's own images (arXiv:2405.20216v1, D.1)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from hgdpo_core.config import SftConfig
from hgdpo_core.devices import default_device
from hgdpo_core.errors import InputError
from hgdpo_core.losses import denoising_error
from hgdpo_core.models import Backbone, Conditioning, Model, load_backbone
from hgdpo_core.models.averaging import WeightAverage
from hgdpo_core.models.backbone import Denoiser, NoiseSchedule
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.rendering.charts import ChartSpec
from hgdpo_core.training.base import OPTIMIZER_CHARTS, Objective, TrainingObjective
from hgdpo_core.training.data import ImageBatch, LatentImages
from hgdpo_core.training.parts import Generators, apply_flips, draw_flips, draw_noise
from hgdpo_core.training.processes import count_processes, is_first_process


def prepare_sft(denoiser: Denoiser, schedule: NoiseSchedule, config: SftConfig, empty: Conditioning) -> Objective:
    """The denoising loss for the loop, over all weights of the denoiser's network: in place, in float32.

    The loss is the mean squared error to the schedule's own prediction target; `empty`, the float32 conditioning of the
    empty text, replaces a caption with probability `caption_dropout`. Log rows: `step`, `loss`, `grad_norm` (before
    clipping), `learning_rate`. With `ema_decay`, the first process's network has the moving average of its weights at
    the end, and in validation. ModelError for an unfit schedule.
    """
    schedule.require_trainable()
    network = denoiser.network
    nn.Module.to(denoiser, dtype=torch.float32).requires_grad_(True).train()

    def batch_loss(trained: nn.Module, batch: ImageBatch, generators: Generators) -> dict[str, torch.Tensor]:
        _check(batch, empty.embeds, len(generators), config.flip)
        latents = batch.latents.to(denoiser.device)
        timesteps = schedule.draw_timesteps(generators).to(denoiser.device)
        noise = draw_noise(generators, latents)
        conditioning = drop_captions(batch.conditioning, empty, config.caption_dropout, generators)
        if batch.mirrored is not None and config.flip:  # drawn last: the others are those of a training without flips
            latents = apply_flips(latents, batch.mirrored, draw_flips(generators))
        return {"loss": prediction_error(trained, schedule, latents, noise, timesteps,
                                         conditioning.to(denoiser.device))}

    average = WeightAverage(network, config.ema_decay) if config.ema_decay and is_first_process() else None
    return Objective("sft", denoiser, batch_loss, network.state_dict, network.load_state_dict,
                     f"learning_rate (now {config.learning_rate:g})", average)


def prediction_error(trained: nn.Module, schedule: NoiseSchedule, latents: torch.Tensor, noise: torch.Tensor,
                     timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """Mean squared error to the schedule's own prediction target, float32 `[B]`, of latents and noise `[B,C,h,w]`.

    The network reads noisy latents in the conditioning's precision.
    """
    noisy = schedule.add_noise(latents, noise, timesteps).to(conditioning.embeds.dtype)
    target = schedule.prediction_target(latents, noise, timesteps)
    return denoising_error(trained(noisy, timesteps, conditioning), target)


def drop_captions(captions: Conditioning, empty: Conditioning, probability: float,
                  generators: Generators) -> Conditioning:
    """The B captions, some replaced by `empty`, of one text: each one's generator decides."""
    draws = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    return captions.replaced(draws < probability, empty)


def _check(batch: ImageBatch, empty_embeds: torch.Tensor, images: int, flip: bool) -> None:
    latents, embeds = batch.latents, batch.prompt_embeds
    if flip and (batch.mirrored is None or batch.mirrored.shape != latents.shape):
        raise InputError("flip is on, but these images hold no latents of their mirror images: cache them with flips")
    fits = latents.ndim == 4 and embeds.ndim == 3 and empty_embeds.shape == (1, *embeds.shape[1:])
    if not fits or not len(latents) == len(embeds) == images:
        raise InputError(f"expected {images} latents [B,C,h,w], embeddings [B,L,D] and empty_embeds [1,L,D], "
                         f"got {list(latents.shape)}, {list(embeds.shape)} and {list(empty_embeds.shape)}")
    if {latents.dtype, embeds.dtype, empty_embeds.dtype} != {torch.float32}:
        raise InputError(f"expected float32 latents and embeddings, got {latents.dtype}, {embeds.dtype}, "
                         f"{empty_embeds.dtype}")


# -- as an objective


class Sft(TrainingObjective):
    """The entry in `OBJECTIVES`; its samples are captioned images, whose latents a stage before has cached."""

    name, title = "sft", "Supervised fine-tuning"
    section, trains_on, config, samples = "sft", "images", SftConfig, LatentImages
    charts = (ChartSpec("Loss", ("loss",), "denoising error of the target model"), *OPTIMIZER_CHARTS)

    def random_batch(self, count: int, latent_shape: Sequence[int], embeds_shape: Sequence[int]) -> ImageBatch:
        return ImageBatch(torch.randn(count, *latent_shape), torch.randn(count, *embeds_shape))

    def prepare(self, backbone: Backbone, model: Model, config: SftConfig) -> Objective:
        """The empty text is embedded as captions were: by an encoder in the model's own precision."""
        reader = load_backbone(model, "cpu" if count_processes() > 1 else default_device())
        empty = reader.text.dropped_caption().to("cpu", torch.float32)
        return prepare_sft(backbone.denoiser, backbone.schedule, config, empty)

    def save(self, backbone: Backbone, folder: Path, model_id: str) -> str:
        backbone.save(folder)
        return "pipeline"

    def trained_numbers(self, size: ModelSize, config: SftConfig) -> int:
        return size.denoiser

    def saved_numbers(self, size: ModelSize, config: SftConfig) -> int:
        return size.whole
