"""Supervised fine-tuning of the whole UNet on the user's own images (arXiv:2405.20216v1, D.1)."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from hgdpo_core.config import SftConfig
from hgdpo_core.errors import InputError
from hgdpo_core.losses import denoising_error
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.schedule import add_noise, prediction_target, training_scheduler
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
    draw_timesteps,
    resolve_precision,
    turn,
)
from hgdpo_core.training.averaging import WeightAverage
from hgdpo_core.training.checkpoints import Checkpoints
from hgdpo_core.training.data import ImageBatch
from hgdpo_core.training.loop import run_training
from hgdpo_core.training.processes import is_first_process


class ImageSource(SampleSource[ImageBatch], Protocol):
    """Random access to captioned images as cached latents."""


def train_sft(unet: UNet2DConditionModel, scheduler_config: Mapping[str, Any], images: ImageSource,
              config: SftConfig, empty_embeds: torch.Tensor, *, checkpoints: Checkpoints | None,
              progress: Progress = silent, should_stop: ShouldStop = never_stop,
              on_log: OnLog | None = None, validate: Validate | None = None) -> TrainingResult:
    """Train all of `unet`, in place, in float32 (or float32 weights under mixed precision).

    The loss is the mean squared error to the schedule's own target; `empty_embeds` `[1,L,D]` float32, the
    embedding of the empty text, replaces a caption with probability `caption_dropout`. With `checkpoints`,
    an earlier attempt with the same config continues exactly where it stood. Log rows: `step`, `loss`, `grad_norm`
    (before clipping), `learning_rate`. With `ema_decay`, the first process's `unet` has the moving average of its
    weights at the end, and in `validate`. Errors: see `run_training`; ModelError for an unfit schedule.
    """
    scheduler = training_scheduler(scheduler_config)
    precision = resolve_precision(config.mixed_precision)
    nn.Module.to(unet, dtype=torch.float32).requires_grad_(True).train()

    def batch_loss(denoiser: nn.Module, batch: ImageBatch, generators: Generators) -> dict[str, torch.Tensor]:
        _check(batch, empty_embeds, len(generators), config.flip)
        latents = batch.latents.to(unet.device)
        timesteps = draw_timesteps(generators, len(scheduler)).to(unet.device)
        noise = draw_noise(generators, latents)
        embeds = drop_captions(batch.prompt_embeds, empty_embeds, config.caption_dropout, generators)
        if batch.mirrored is not None and config.flip:  # drawn last: the other draws are those of a training without
            latents = turn(latents, batch.mirrored, draw_flips(generators))
        noisy = add_noise(scheduler, latents, noise, timesteps)
        target = prediction_target(scheduler, latents, noise, timesteps)
        return {"loss": denoising_error(denoiser(noisy, timesteps, embeds.to(unet.device)), target)}

    average = WeightAverage(unet, config.ema_decay) if config.ema_decay and is_first_process() else None
    objective = Objective("sft", unet, batch_loss, lambda: _weights(unet), unet.load_state_dict,
                          f"learning_rate (now {config.learning_rate:g})", average)
    hooks = Hooks(progress, should_stop, on_log, _on_average(validate, average))
    result = run_training(objective, images, config, precision, checkpoints, hooks)
    if average is not None:
        average.put_in_place()
    return result


def _on_average(validate: Validate | None, average: WeightAverage | None) -> Validate | None:
    if validate is None or average is None:
        return validate

    def validate_average(step: int) -> None:
        with average.in_place():
            validate(step)

    return validate_average


def drop_captions(prompt_embeds: torch.Tensor, empty_embeds: torch.Tensor, probability: float,
                  generators: Generators) -> torch.Tensor:
    """`prompt_embeds` `[B,L,D]`, some rows replaced by `empty_embeds` `[1,L,D]`: each row's generator decides."""
    draws = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    dropped = (draws < probability).to(prompt_embeds.device)
    return torch.where(dropped[:, None, None], empty_embeds.to(prompt_embeds.device), prompt_embeds)


def _weights(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in unet.state_dict().items()}


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
