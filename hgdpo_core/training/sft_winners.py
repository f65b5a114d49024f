"""Supervised fine-tuning of a LoRA on the winners of triplets, a baseline of the paper (arXiv:2405.20216v1, Table 1).

The paper names no parameters. Ours: DPO's LoRA layers, rank, optimizer, learning rate and steps, and as many images for
each step: two winners for each pair of a batch. Captions are never dropped, so only the objective differs.
"""

from collections.abc import Sequence

import torch
from torch import nn

from hgdpo_core.config import RunConfig, WinnersConfig
from hgdpo_core.errors import InputError
from hgdpo_core.models import Backbone, Model
from hgdpo_core.models.backbone import Denoiser, NoiseSchedule
from hgdpo_core.rendering.charts import ChartSpec
from hgdpo_core.training.base import OPTIMIZER_CHARTS, Objective
from hgdpo_core.training.data import PairBatch, Winners
from hgdpo_core.training.lora import TripletObjective, put_lora
from hgdpo_core.training.parts import Generators, apply_flips, draw_flips, draw_noise
from hgdpo_core.training.sft import prediction_error


def prepare_winners(denoiser: Denoiser, schedule: NoiseSchedule, config: WinnersConfig) -> Objective:
    """The denoising loss for the loop, and a LoRA on the denoiser's network that it trains, in place.

    A sample is two winners: its loss is their mean. Log rows: `step`, `loss`, `grad_norm` (before clipping) and
    `learning_rate`. ModelError for a network or schedule that cannot be trained.
    """
    schedule.require_trainable()
    lora = put_lora(denoiser, config)

    def batch_loss(trained: nn.Module, batch: PairBatch, generators: Generators) -> dict[str, torch.Tensor]:
        latents, each = batch.winner_latents.to(denoiser.device), [one for one in generators for _ in range(2)]
        if len(latents) != len(each):
            raise InputError(f"expected two winners for each of {len(generators)} samples, got {len(latents)}")
        timesteps, noise = schedule.draw_timesteps(each).to(denoiser.device), draw_noise(each, latents)
        if config.flip:
            if batch.winner_mirrored is None:
                raise InputError("flip is on, but these winners lack the latents of mirrored images: cache them with "
                                 "flips")
            latents = apply_flips(latents, batch.winner_mirrored, draw_flips(each))
        conditioning = batch.conditioning.to(denoiser.device, lora.read_dtype)
        errors = prediction_error(trained, schedule, latents, noise, timesteps, conditioning)
        return {"loss": errors.reshape(-1, 2).mean(1)}

    return lora.objective("sft_winners", batch_loss)


class SftWinners(TripletObjective):
    """The entry in `OBJECTIVES`."""

    name, title = "sft_winners", "Fine-tuning on winners"
    made_by = ("by supervised fine-tuning on the best of the model's own images, a baseline in "
               "[HG-DPO, arXiv:2405.20216v1](https://arxiv.org/abs/2405.20216v1)")
    config, samples = WinnersConfig, Winners
    charts = (ChartSpec("Loss", ("loss",), "denoising error of winners"), *OPTIMIZER_CHARTS)

    def settings(self, config: RunConfig) -> WinnersConfig:
        own = super().settings(config).model_dump(include=set(WinnersConfig.model_fields))
        return WinnersConfig.model_validate(own)

    def random_batch(self, count: int, latent_shape: Sequence[int], embeds_shape: Sequence[int]) -> PairBatch:
        return super().random_batch(2 * count, latent_shape, embeds_shape)

    def prepare(self, backbone: Backbone, model: Model, config: WinnersConfig) -> Objective:
        return prepare_winners(backbone.denoiser, backbone.schedule, config)
