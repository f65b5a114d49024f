"""Supervised fine-tuning of the whole network on the user's own images (arXiv:2405.20216v1, D.1)."""

from typing import Protocol

import torch
from torch import nn

from hgdpo_core.config import SftConfig
from hgdpo_core.errors import InputError
from hgdpo_core.losses import denoising_error
from hgdpo_core.models import Conditioning
from hgdpo_core.models.averaging import WeightAverage
from hgdpo_core.models.backbone import Denoiser, NoiseSchedule
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
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
    resolve_precision,
    turn,
)
from hgdpo_core.training.checkpoints import Checkpoints
from hgdpo_core.training.data import ImageBatch
from hgdpo_core.training.loop import run_training
from hgdpo_core.training.processes import is_first_process


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
    schedule.require_trainable()
    precision, network = resolve_precision(config.mixed_precision), denoiser.network
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
