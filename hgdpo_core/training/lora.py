"""What all objectives have in common that train a LoRA beside a frozen network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hgdpo_core.config import LoraConfig, RunConfig, WinnersConfig
from hgdpo_core.errors import InputError
from hgdpo_core.models import Backbone, Model
from hgdpo_core.models.backbone import Denoiser
from hgdpo_core.models.files import LORA_NAME
from hgdpo_core.models.lora import add_lora, cast_lora_weights, load_lora_state, lora_state, write_kohya_lora
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.stages.triplets import model_fingerprint
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.base import BatchLoss, Objective, TrainingObjective
from hgdpo_core.training.data import PairBatch, SampleSource
from hgdpo_core.training.parts import cast_frozen, resolve_precision


@dataclass(frozen=True)
class TrainedLora:
    """A new LoRA on a denoiser's network."""

    denoiser: Denoiser
    config: LoraConfig

    @property
    def read_dtype(self) -> torch.dtype:
        """Of what the network reads: autocast itself casts it, without autocast all that it computes is bf16."""
        return torch.float32 if self.config.autocast else torch.bfloat16

    def objective(self, name: str, batch_loss: BatchLoss, what_to_lower: str = "") -> Objective:
        """Its training for the loop, by that loss."""
        network, rate = self.denoiser.network, f"learning_rate (now {self.config.learning_rate:g})"
        return Objective(name, self.denoiser, batch_loss, weights=lambda: lora_state(network),
                         load_weights=lambda state: load_lora_state(network, state),
                         what_to_lower=f"{rate}{what_to_lower}", autocast=self.config.autocast)


def put_lora(denoiser: Denoiser, config: LoraConfig) -> TrainedLora:
    """A LoRA that is trained, on the denoiser's network, in place; the network itself is frozen and evaluates.

    Under mixed precision the frozen weights stay in that precision: load the target again to sample from it.
    ModelError for a network that cannot be trained.
    """
    network = denoiser.network
    add_lora(network, config.lora_rank, config.seed, denoiser.lora_targets)
    cast_lora_weights(network)
    cast_frozen(network, resolve_precision(config.mixed_precision))
    denoiser.eval()  # dropout, where a network has some, would part the policy from an equal reference
    return TrainedLora(denoiser, config)


class LoraObjective(TrainingObjective):
    """A training whose result is a LoRA, as diffusers and as kohya read it."""

    def save(self, backbone: Backbone, folder: Path, model_id: str) -> str:
        backbone.save_lora(folder)
        write_kohya_lora(folder / LORA_NAME, folder / f"{model_id}-kohya.safetensors",
                         original_names=backbone.denoiser.original_names)
        return "lora"

    def trained_numbers(self, size: ModelSize, config: LoraConfig) -> int:
        return config.lora_rank * size.attention


class TripletObjective(LoraObjective):
    """A LoRA trained on triplets, whose latents a stage before has cached."""

    section, trains_on = "dpo", "triplets"

    def settings(self, config: RunConfig) -> WinnersConfig:
        """Its settings; pairs that a run names are another model's by the user's wish."""
        own = super().settings(config)
        assert isinstance(own, WinnersConfig)
        return own if config.pairs is None else own.model_copy(update={"allow_foreign_triplets": True})

    def require_fit(self, store: Store, triplets: str | None, samples: SampleSource[Any], indices: Sequence[int],
                    model: Model, config: WinnersConfig) -> None:
        assert triplets is not None
        if not len(samples):
            raise InputError(f"{triplets} holds no triplet to train on: every pool was rejected, see its rejected/")
        if not config.allow_foreign_triplets:
            _refuse_foreign(ShardFolder.open(store, triplets), indices, model)

    def random_batch(self, count: int, latent_shape: Sequence[int], embeds_shape: Sequence[int]) -> PairBatch:
        winners, losers = (torch.randn(count, *latent_shape) for _ in range(2))
        return PairBatch(winners, losers, torch.randn(count, *embeds_shape))


def _refuse_foreign(triplets: ShardFolder, indices: Sequence[int], model: Model) -> None:
    own = model_fingerprint(model.identity())
    for index in indices:
        made_by = set(triplets.read_columns(index, ["model_fingerprint"])["model_fingerprint"].to_pylist())
        if made_by - {own}:
            raise InputError(f"{triplets.key} was made by model {sorted(made_by - {own})[0][:12]}, the target is "
                             f"{own[:12]}: train the model that generated the pool, or set dpo.allow_foreign_triplets")
