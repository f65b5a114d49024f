"""Diffusion-DPO with the statistic matching loss on a LoRA (arXiv:2405.20216v1, Eq. 9)."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from hgdpo_core.config import DpoConfig
from hgdpo_core.errors import InputError
from hgdpo_core.losses import denoising_error, diffusion_dpo_loss, preference_margin
from hgdpo_core.models import Backbone, Model
from hgdpo_core.models.backbone import Denoiser, NoiseSchedule
from hgdpo_core.models.files import LORA_NAME
from hgdpo_core.models.lora import (
    add_lora,
    cast_lora_weights,
    load_lora_state,
    lora_state,
    reference_mode,
    write_kohya_lora,
)
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.rendering.charts import ChartSpec
from hgdpo_core.stages.triplets import model_fingerprint
from hgdpo_core.statistics.checks import PREFERENCE_CHECKS, CollapseWatch
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.base import OPTIMIZER_CHARTS, Objective, OnLog, TrainingObjective
from hgdpo_core.training.data import LatentPairs, PairBatch, SampleSource
from hgdpo_core.training.parts import Generators, apply_flips, cast_frozen, draw_flips, draw_noise, resolve_precision

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
    network = denoiser.network
    add_lora(network, config.lora_rank, config.seed, denoiser.lora_targets)
    cast_lora_weights(network)
    cast_frozen(network, resolve_precision(config.mixed_precision))
    read_dtype = torch.float32 if config.autocast else torch.bfloat16  # autocast itself casts what layers read
    denoiser.eval()  # dropout, where a network has some, would part the policy from an equal reference

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
        noisy = schedule.add_noise(latents, noise, both_timesteps).to(read_dtype)
        target = schedule.prediction_target(latents, noise, both_timesteps)
        conditioning = batch.conditioning.repeat(2).to(denoiser.device, read_dtype)
        with reference_mode(network):
            reference = trained(noisy, both_timesteps, conditioning)
        policy = trained(noisy, both_timesteps, conditioning)
        return pair_losses(policy, reference, target, timesteps, schedule, config)

    return Objective("dpo", denoiser, batch_loss, weights=lambda: lora_state(network),
                     load_weights=lambda state: load_lora_state(network, state),
                     what_to_lower=f"learning_rate (now {config.learning_rate:g}) or beta (now {config.beta:g})",
                     autocast=config.autocast)


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


class Dpo(TrainingObjective):
    """The entry in `OBJECTIVES`; its samples are triplets, whose latents a stage before has cached."""

    name, title = "dpo", "DPO training"
    config, samples = DpoConfig, LatentPairs
    charts, checks = (*CHARTS, *OPTIMIZER_CHARTS), PREFERENCE_CHECKS

    def require_fit(self, store: Store, triplets: str | None, samples: SampleSource[PairBatch], indices: Sequence[int],
                    model: Model, config: DpoConfig) -> None:
        assert triplets is not None
        if not len(samples):
            raise InputError(f"{triplets} holds no triplet to train on: every pool was rejected, see its rejected/")
        if not config.allow_foreign_triplets:
            _refuse_foreign(ShardFolder.open(store, triplets), indices, model)

    def random_batch(self, count: int, latent_shape: Sequence[int], embeds_shape: Sequence[int]) -> PairBatch:
        winners, losers = (torch.randn(count, *latent_shape) for _ in range(2))
        return PairBatch(winners, losers, torch.randn(count, *embeds_shape))

    def prepare(self, backbone: Backbone, model: Model, config: DpoConfig) -> Objective:
        return prepare_dpo(backbone.denoiser, backbone.schedule, config)

    def save(self, backbone: Backbone, folder: Path, model_id: str) -> str:
        backbone.save_lora(folder)
        write_kohya_lora(folder / LORA_NAME, folder / f"{model_id}-kohya.safetensors")
        return "lora"

    def watch(self, warn: Callable[[str], object]) -> OnLog:
        return CollapseWatch(warn)

    def with_derived(self, log: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        """With `winner_rise` and `loser_rise`: the fraction by which an error is above the reference's."""
        return [{**row, **{f"{side}_rise": row[f"{side}_error"] / row[f"reference_{side}_error"] - 1
                           for side in ("winner", "loser")
                           if row.get(f"reference_{side}_error") and f"{side}_error" in row}} for row in log]

    def trained_numbers(self, size: ModelSize, config: DpoConfig) -> int:
        return config.lora_rank * size.attention


def _refuse_foreign(triplets: ShardFolder, indices: Sequence[int], model: Model) -> None:
    own = model_fingerprint(model.identity())
    for index in indices:
        made_by = set(triplets.read_columns(index, ["model_fingerprint"])["model_fingerprint"].to_pylist())
        if made_by - {own}:
            raise InputError(f"{triplets.key} was made by model {sorted(made_by - {own})[0][:12]}, the target is "
                             f"{own[:12]}: train the model that generated the pool, or set dpo.allow_foreign_triplets")
