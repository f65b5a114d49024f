"""Diffusion-DPO with the statistic matching loss on a LoRA (arXiv:2405.20216v1, Eq. 9)."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from hgdpo_core.config import DpoConfig
from hgdpo_core.errors import InputError
from hgdpo_core.losses import denoising_error, diffusion_dpo_loss, preference_margin
from hgdpo_core.models import Backbone, Model
from hgdpo_core.models.backbone import Denoiser, NoiseSchedule
from hgdpo_core.models.lora import reference_mode
from hgdpo_core.rendering.charts import ChartSpec
from hgdpo_core.statistics.checks import PREFERENCE_CHECKS, CollapseWatch
from hgdpo_core.training.base import OPTIMIZER_CHARTS, Objective, OnLog
from hgdpo_core.training.data import LatentPairs, PairBatch
from hgdpo_core.training.lora import TripletObjective, put_lora
from hgdpo_core.training.parts import Generators, apply_flips, draw_flips, draw_noise

CHARTS = (
    ChartSpec("Loss", ("loss",), "all terms together, weighted"),
    ChartSpec("DPO loss", ("dpo_loss",), "dashed: log 2, policy equal to reference", math.log(2)),
    ChartSpec("Statistic matching loss", ("stat_loss",), "0: colours stay where they were"),
    ChartSpec("Margin", ("margin",), "below 0: winners gained on losers", 0.0),
    ChartSpec("Implicit accuracy", ("implicit_accuracy",), "fraction of pairs with a margin below 0", 0.5),
    ChartSpec("Denoising error", ("winner_error", "loser_error"), "policy: winner solid, loser dashed"),
    ChartSpec("Rise of the error", ("winner_rise", "loser_rise"), "against the reference: winner solid, loser dashed; "
              "both far above 0 is collapse", 0.0),
)


def prepare_dpo(denoiser: Denoiser, schedule: NoiseSchedule, config: DpoConfig) -> Objective:
    """The loss of Eq. 9 for the loop, and a LoRA on the denoiser's network that it trains, in place.

    The network stays on the training device, and under mixed precision its frozen weights stay in that precision: load
    the target again to sample from it. Without `config.autocast` all that it computes is bf16; noise, its prediction
    target and the losses are float32 in any case. ModelError for a network or schedule that cannot be trained.

    Log rows: `step`, `loss`, `dpo_loss`, `stat_loss` (unweighted), `margin` (negative is good), `implicit_accuracy`
    (fraction of pairs with a negative margin; zero counts half), `winner_error`, `loser_error`,
    `reference_winner_error`, `reference_loser_error`, `grad_norm` (before clipping) and `learning_rate`.
    """
    schedule.require_trainable()
    lora, network = put_lora(denoiser, config), denoiser.network

    def batch_loss(trained: nn.Module, batch: PairBatch, generators: Generators) -> dict[str, torch.Tensor]:
        _check(batch, len(generators), config.flip)
        winner, loser = batch.winner_latents.to(denoiser.device), batch.loser_latents.to(denoiser.device)
        timesteps = schedule.draw_timesteps(generators)
        winner_noise = draw_noise(generators, winner)
        loser_noise = winner_noise if config.share_noise else draw_noise(generators, loser)
        if batch.winner_mirrored is not None and batch.loser_mirrored is not None and config.flip:
            flips = draw_flips(generators)  # last: timesteps and noise are those of a training without flips
            winner, loser = (apply_flips(winner, batch.winner_mirrored, flips),
                             apply_flips(loser, batch.loser_mirrored, flips))

        latents = torch.cat([winner, loser])
        noise = torch.cat([winner_noise, loser_noise])
        both_timesteps = torch.cat([timesteps, timesteps]).to(denoiser.device)
        noisy = schedule.add_noise(latents, noise, both_timesteps).to(lora.read_dtype)
        target = schedule.prediction_target(latents, noise, both_timesteps)
        conditioning = batch.conditioning.repeat(2).to(denoiser.device, lora.read_dtype)
        with reference_mode(network):
            reference = trained(noisy, both_timesteps, conditioning)
        policy = trained(noisy, both_timesteps, conditioning)
        return pair_losses(policy, reference, target, timesteps, schedule, config)

    return lora.objective("dpo", batch_loss, f" or beta (now {config.beta:g})")


def pair_losses(policy: torch.Tensor, reference: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor,
                schedule: NoiseSchedule, config: DpoConfig) -> dict[str, torch.Tensor]:
    """Eq. 9 and its parts for B pairs, float32 `[B]` by log name.

    `policy`, `reference` and `target` are `[2B,C,H,W]`, winners first; `timesteps` `[B]` are shared by a pair.
    """
    errors = [error for tensor in (policy, reference) for error in denoising_error(tensor, target).chunk(2)]
    dpo_loss = diffusion_dpo_loss(*errors, beta=config.beta)
    stat_loss = torch.zeros_like(dpo_loss)
    if config.lambda_stat > 0:
        stat_loss = schedule.statistic_matching(policy.chunk(2)[0], reference.chunk(2)[0], timesteps)
    margin = preference_margin(*errors)
    return {
        "loss": dpo_loss + config.lambda_stat * stat_loss, "dpo_loss": dpo_loss, "stat_loss": stat_loss,
        "margin": margin, "implicit_accuracy": (1 - margin.sign()) / 2,
        "winner_error": errors[0], "loser_error": errors[1],
        "reference_winner_error": errors[2], "reference_loser_error": errors[3],
    }


def _check(batch: PairBatch, pairs: int, flip: bool) -> None:
    winner, loser, embeds = batch.winner_latents, batch.loser_latents, batch.prompt_embeds
    for mirrored in (batch.winner_mirrored, batch.loser_mirrored) if flip else ():
        if mirrored is None or mirrored.shape != winner.shape:
            raise InputError("flip is on, but these pairs lack the latents of mirrored images: cache them with flips")
    fits = winner.ndim == 4 and embeds.ndim == 3 and winner.shape == loser.shape
    if not fits or not len(winner) == len(embeds) == pairs:
        raise InputError(f"expected {pairs} pairs of latents [B,C,h,w] of one size and embeddings [B,L,D], got winners "
                         f"{list(winner.shape)}, losers {list(loser.shape)}, embeddings {list(embeds.shape)}")
    if batch.prompt_mask is not None and batch.prompt_mask.shape != embeds.shape[:2]:
        raise InputError(f"expected a mask [B,L] for embeddings {list(embeds.shape)}, got "
                         f"{list(batch.prompt_mask.shape)}")
    if {winner.dtype, loser.dtype, embeds.dtype} != {torch.float32}:
        raise InputError(f"expected float32 latents and embeddings, got {winner.dtype}, {loser.dtype}, "
                         f"{embeds.dtype}")


# -- as an objective


class Dpo(TripletObjective):
    """The entry in `OBJECTIVES`."""

    name, title, method = "dpo", "DPO training", "HG-DPO"
    made_by = ("by Direct Preference Optimization on the model's own images, as in "
               "[HG-DPO, arXiv:2405.20216v1](https://arxiv.org/abs/2405.20216v1)")
    config, samples = DpoConfig, LatentPairs
    charts, checks = (*CHARTS, *OPTIMIZER_CHARTS), PREFERENCE_CHECKS

    def prepare(self, backbone: Backbone, model: Model, config: DpoConfig) -> Objective:
        return prepare_dpo(backbone.denoiser, backbone.schedule, config)

    def watch(self, warn: Callable[[str], object]) -> OnLog:
        return CollapseWatch(warn)

    def with_derived(self, log: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        """With `winner_rise` and `loser_rise`: the fraction by which an error is above the reference's."""
        return [{**row, **{f"{side}_rise": row[f"{side}_error"] / row[f"reference_{side}_error"] - 1
                           for side in ("winner", "loser")
                           if row.get(f"reference_{side}_error") and f"{side}_error" in row}} for row in log]
