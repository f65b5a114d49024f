"""Supervised fine-tuning of the whole network on the user's own images (arXiv:2405.20216v1, D.1)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from hgdpo_core.config import SftConfig
from hgdpo_core.errors import InputError
from hgdpo_core.losses import denoising_error
from hgdpo_core.models import Backbone, Conditioning, Model, load_backbone
from hgdpo_core.models.averaging import WeightAverage
from hgdpo_core.models.backbone import Denoiser, NoiseSchedule
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.rendering.charts import ChartSpec
from hgdpo_core.statistics.checks import LogCheck
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training import (
    Generators,
    Hooks,
    Objective,
    OnLog,
    SampleSource,
    TrainingResult,
    Validate,
    draw_flips,
    draw_noise,
    turn,
)
from hgdpo_core.training.checkpoints import Checkpoints
from hgdpo_core.training.data import ImageBatch, LatentImages
from hgdpo_core.training.loop import run_training
from hgdpo_core.training.processes import is_first_process

CHARTS = (
    ChartSpec("Loss", ("loss",), "denoising error of the target model"),
    ChartSpec("Gradient norm", ("grad_norm",), "before clipping"),
    ChartSpec("Learning rate", ("learning_rate",), "after warm-up and schedule"),
)


class ImageSource(SampleSource[ImageBatch], Protocol):
    """Random access to captioned images as cached latents."""


def train_sft(denoiser: Denoiser, schedule: NoiseSchedule, images: ImageSource, config: SftConfig,
              empty: Conditioning, *, checkpoints: Checkpoints | None,
              progress: Progress = silent, should_stop: ShouldStop = never_stop,
              on_log: OnLog | None = None, validate: Validate | None = None) -> TrainingResult:
    """Train all weights of the denoiser's network, in place, in float32 (or float32 weights under mixed precision).

    The loss is the mean squared error to the schedule's own target; `empty`, the float32 conditioning of the empty
    text, replaces a caption with probability `caption_dropout`. With `checkpoints`,
    an earlier attempt with the same config continues exactly where it stood. Log rows: `step`, `loss`, `grad_norm`
    (before clipping), `learning_rate`. With `ema_decay`, the first process's network has the moving average of its
    weights at the end, and in `validate`. Errors: see `run_training`; ModelError for an unfit schedule.
    """
    hooks = Hooks(progress, should_stop, on_log, validate)
    return run_training(prepare_sft(denoiser, schedule, config, empty), images, config, checkpoints, hooks)


def prepare_sft(denoiser: Denoiser, schedule: NoiseSchedule, config: SftConfig, empty: Conditioning) -> Objective:
    """The denoising loss for the loop, over all weights of the denoiser's network."""
    schedule.require_trainable()
    network = denoiser.network
    nn.Module.to(denoiser, dtype=torch.float32).requires_grad_(True).train()

    def batch_loss(trained: nn.Module, batch: ImageBatch, generators: Generators) -> dict[str, torch.Tensor]:
        _check(batch, empty.embeds, len(generators), config.flip)
        latents = batch.latents.to(denoiser.device)
        timesteps = schedule.draw_timesteps(generators).to(denoiser.device)
        noise = draw_noise(generators, latents)
        conditioning = drop_captions(batch.conditioning, empty, config.caption_dropout, generators)
        if batch.mirrored is not None and config.flip:  # drawn last: the other draws are those of a training without
            latents = turn(latents, batch.mirrored, draw_flips(generators))
        noisy = schedule.add_noise(latents, noise, timesteps)
        target = schedule.prediction_target(latents, noise, timesteps)
        return {"loss": denoising_error(trained(noisy, timesteps, conditioning.to(denoiser.device)), target)}

    average = WeightAverage(network, config.ema_decay) if config.ema_decay and is_first_process() else None
    objective = Objective("sft", denoiser, batch_loss, lambda: _weights(network), network.load_state_dict,
                          f"learning_rate (now {config.learning_rate:g})")
    if average is None:
        return objective
    return replace(objective, follower=average, as_kept=average.in_place, finish=average.put_in_place)


def drop_captions(captions: Conditioning, empty: Conditioning, probability: float,
                  generators: Generators) -> Conditioning:
    """The B captions, some replaced by `empty`, of one text: each one's generator decides."""
    draws = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    return captions.replaced(draws < probability, empty)


def _weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}


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


class Sft:
    """The entry in `OBJECTIVES`; its samples are captioned images as latents."""

    name, title = "sft", "Supervised fine-tuning"
    config = SftConfig
    charts = CHARTS
    checks: tuple[LogCheck, ...] = ()

    def samples(self, latents: ShardFolder, indices: Sequence[int]) -> LatentImages:
        return LatentImages(latents, indices)

    def require_fit(self, store: Store, triplets: str | None, samples: SampleSource[ImageBatch],
                    indices: Sequence[int], model: Model, config: SftConfig) -> None:
        """Any images will do; that there are some, their encoding has checked."""

    def random_batch(self, count: int, latent_shape: Sequence[int], embeds_shape: Sequence[int]) -> ImageBatch:
        return ImageBatch(torch.randn(count, *latent_shape), torch.randn(count, *embeds_shape))

    def prepare(self, backbone: Backbone, model: Model, config: SftConfig) -> Objective:
        """The empty text is embedded as captions were: by an encoder in the model's own precision."""
        reader = load_backbone(model, backbone.denoiser.device.type)
        empty = reader.text.encode_captions([""]).to("cpu", torch.float32)
        return prepare_sft(backbone.denoiser, backbone.schedule, config, empty)

    def save(self, backbone: Backbone, folder: Path, model_id: str) -> str:
        backbone.save(folder)
        return "pipeline"

    def watch(self, warn: Callable[[str], object]) -> OnLog:
        return lambda row: None

    def with_derived(self, log: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
        return log

    def trained_numbers(self, size: ModelSize, config: SftConfig) -> int:
        return size.denoiser

    def saved_numbers(self, size: ModelSize, config: SftConfig) -> int:
        return size.whole
