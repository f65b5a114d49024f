"""InstantBooth: adapters that read a person's image, trained beside a frozen target (arXiv:2304.03411).

Ours where its paper is silent, see `models/instantbooth.py`; no caption is dropped, as guidance's other branch has no
adapter. The image encoder reads each concept turned, scaled, moved and mirrored, another way each time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hgdpo_core.config import InstantBoothConfig, RunConfig
from hgdpo_core.errors import ConfigError, InputError
from hgdpo_core.images import decode_image, encode_image
from hgdpo_core.models import Backbone, Conditioning, Model
from hgdpo_core.models.backbone import Denoiser, NoiseSchedule
from hgdpo_core.models.instantbooth import (
    PLACES,
    POOLED,
    STATES,
    STRENGTHS,
    ConceptNetwork,
    ImageEncoder,
    InstantBoothDenoiser,
    NetworkShape,
    attached_adapter,
    concept_places,
    encoder_fingerprint,
    find_image_encoder,
    require_word,
    save_instantbooth,
)
from hgdpo_core.models.locations import Location, refuse_other_model
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.rendering.charts import ChartSpec
from hgdpo_core.stages.concept_latents import SMALLEST_CONCEPT
from hgdpo_core.storage import Store
from hgdpo_core.training.base import OPTIMIZER_CHARTS, Objective, TrainingObjective
from hgdpo_core.training.data import LatentRows
from hgdpo_core.training.parts import Generators, cast_frozen, draw_noise, resolve_precision
from hgdpo_core.training.sft import prediction_error

TURN, ZOOM, SHIFT = 15.0, 0.15, 0.15
"""Most of what a concept is turned by (degrees), scaled by (fraction) and moved by (of half its side)."""


class InstantBoothSettings(InstantBoothConfig):
    """The settings of a training, with what decides its id beside them."""

    encoder_fingerprint: str

    @classmethod
    def of(cls, config: InstantBoothConfig) -> Self:
        """With the fingerprint of the image encoder that they name; ConfigError or ModelError where there is none."""
        fingerprint = encoder_fingerprint(find_image_encoder(config.image_encoder))
        return cls.model_validate({**config.model_dump(), "encoder_fingerprint": fingerprint})


@dataclass(frozen=True)
class ConceptBatch:
    """B images of people: scaled latents `[B,C,h,w]`, captions' embeddings `[B,L,D]`, where V is, bool `[B,L]`, and
    the images of their concepts as the image encoder reads them, float32 `[B,3,S,S]`."""

    latents: torch.Tensor
    prompt_embeds: torch.Tensor
    places: torch.Tensor
    concepts: torch.Tensor


def prepare_instantbooth(denoiser: Denoiser, schedule: NoiseSchedule, config: InstantBoothConfig,
                         encoder: ImageEncoder) -> Objective:
    """The denoising loss for the loop, over new adapters in the denoiser's network, which is frozen; in place.

    Log rows: `step`, `loss`, `gate` (mean of |tanh(gamma)|), `grad_norm` (before clipping), `learning_rate`.
    ModelError for an unfit schedule.
    """
    schedule.require_trainable()
    trained = attach_new(denoiser, config, encoder)
    concepts = trained.concepts
    precision = resolve_precision(config.mixed_precision)
    cast_frozen(trained, precision)

    def batch_loss(network: nn.Module, batch: ConceptBatch, generators: Generators) -> dict[str, torch.Tensor]:
        _check(batch, len(generators))
        latents = batch.latents.to(trained.device)
        timesteps, noise = schedule.draw_timesteps(generators).to(trained.device), draw_noise(generators, latents)
        seen = move_concepts(batch.concepts, generators).to(trained.device)
        conditioning = concept_conditioning(batch, *encoder.read(seen)).to(trained.device)
        errors = prediction_error(network, schedule, latents, noise, timesteps, conditioning)
        gates = torch.stack([adapter.gamma for adapter in concepts.adapters.values()])  # type: ignore[misc]
        return {"loss": errors, "gate": torch.tanh(gates.detach()).abs().mean().float().expand(len(errors))}

    return Objective("instantbooth", trained, batch_loss, weights=concepts.state_dict,
                     load_weights=concepts.load_state_dict, parameter_groups=lambda: rate_groups(concepts, config),
                     what_to_lower=f"learning_rate (now {config.learning_rate:g})")


def attach_new(denoiser: Denoiser, config: InstantBoothConfig, encoder: ImageEncoder) -> InstantBoothDenoiser:
    """The denoiser with new adapters, which alone are trained; they change no bit yet."""
    network = denoiser.network.requires_grad_(False)
    shape = NetworkShape.of(network, config.concept_word, encoder.width)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        concepts = ConceptNetwork(shape)
    trained = InstantBoothDenoiser(network, concepts.to(network.device), encoder)
    encoder.network.to(network.device)
    return trained.eval()


def rate_groups(concepts: ConceptNetwork, config: InstantBoothConfig) -> list[dict[str, Any]]:
    """The trained weights by learning rate: adapters, E_c and E_p, gates."""
    gates = [adapter.gamma for adapter in concepts.adapters.values()]
    linear = [*concepts.embed.parameters(), *concepts.tokens.parameters()]
    others = [p for name, p in concepts.adapters.named_parameters() if not name.endswith("gamma")]
    return [{"params": others}, {"params": linear, "lr": config.linear_learning_rate},
            {"params": gates, "lr": config.gate_learning_rate, "weight_decay": 0.0}]


def concept_conditioning(batch: ConceptBatch, states: torch.Tensor, pooled: torch.Tensor) -> Conditioning:
    """Captions with concepts at full strength, as both are trained."""
    extra = {STATES: states, POOLED: pooled, PLACES: batch.places, STRENGTHS: torch.ones(len(states), 2)}
    return replace(Conditioning(batch.prompt_embeds), extra=extra)


def move_concepts(concepts: torch.Tensor, generators: Generators) -> torch.Tensor:
    """Images `[B,3,S,S]`, each turned, scaled, moved and mirrored by its own generator; edges are repeated."""
    draws = torch.stack([torch.rand(5, generator=generator) for generator in generators])
    angle, zoom, x, y = (2 * draws[:, :4] - 1).T * torch.tensor([math.radians(TURN), ZOOM, SHIFT, SHIFT])[:, None]
    scale, side = 1 + zoom, torch.where(draws[:, 4] < 0.5, -1.0, 1.0)
    rows = [torch.stack([side * scale * angle.cos(), -scale * angle.sin(), x], dim=-1),
            torch.stack([side * scale * angle.sin(), scale * angle.cos(), y], dim=-1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(concepts.shape), align_corners=False)
    return F.grid_sample(concepts, grid, padding_mode="border", align_corners=False)


# -- as an objective


@dataclass(frozen=True)
class PeopleBatch:
    """B images of people as shards hold them: scaled latents, captions' embeddings, captions, and concepts as PNG."""

    latents: torch.Tensor
    prompt_embeds: torch.Tensor
    captions: Sequence[str]
    concepts: Sequence[bytes]


class PeopleRows(LatentRows):
    """The images of people that a training reads."""

    def batch(self, indices: Sequence[int]) -> PeopleBatch:
        with self.fetching(indices):
            return PeopleBatch(self.stack(indices, "latents", "latent_shape"),
                               self.stack(indices, "prompt_embeds", "embeds_shape"),
                               [self._cell(row, "caption") for row in indices],
                               [self._cell(row, "concept") for row in indices])


class InstantBoothTraining(TrainingObjective):
    """The entry in `OBJECTIVES`; its samples are captioned images of people, whose latents and concepts a stage before
    has cached (`stages/concept_latents.py`). No run trains it: `tune` makes an adapter that runs are evaluated with."""

    name, title = "instantbooth", "InstantBooth adapter"
    section, trains_on, config, samples = "instantbooth", "images", InstantBoothSettings, PeopleRows
    charts = (ChartSpec("Loss", ("loss",), "denoising error of the personalised target"),
              ChartSpec("Gates", ("gate",), "mean of |tanh(gamma)|, 0 at the start"), *OPTIMIZER_CHARTS)

    def settings(self, config: RunConfig) -> InstantBoothSettings:
        raise ConfigError("an InstantBooth adapter is trained on images of people, apart from a run: expected another "
                          "objective")

    def locate(self, store: Store, config: InstantBoothSettings, *, copy_to_store: bool) -> dict[str, Any]:
        found = Location.of_source(store, config.image_encoder, copy_to_store=copy_to_store)
        return {"image_encoder": found.model_dump()}

    def find_located(self, store: Store, config: InstantBoothSettings,
                     locations: Mapping[str, Any]) -> InstantBoothSettings:
        source = Location.model_validate(locations["image_encoder"]).locate(store)
        found = InstantBoothSettings.of(config.model_copy(update={"image_encoder": source}))
        refuse_other_model("image encoder", found.encoder_fingerprint, config.encoder_fingerprint)
        return found

    def random_batch(self, count: int, latent_shape: Sequence[int], embeds_shape: Sequence[int]) -> PeopleBatch:
        concept = encode_image(np.zeros((SMALLEST_CONCEPT, SMALLEST_CONCEPT, 3), dtype=np.uint8), "png")
        return PeopleBatch(torch.randn(count, *latent_shape), torch.randn(count, *embeds_shape), [""] * count,
                           [concept] * count)

    def prepare(self, backbone: Backbone, model: Model, config: InstantBoothSettings) -> Objective:
        encoder = ImageEncoder.load(find_image_encoder(config.image_encoder))
        text = backbone.text.reading("plain")
        require_word(text, config.concept_word)
        objective = prepare_instantbooth(backbone.denoiser, backbone.schedule, config, encoder)

        def batch_loss(trained: nn.Module, batch: PeopleBatch, generators: Generators) -> dict[str, torch.Tensor]:
            places = torch.stack(concept_places(text, batch.captions, config.concept_word))
            pixels = encoder.pixels([decode_image(concept) for concept in batch.concepts])
            return objective.batch_loss(trained, ConceptBatch(batch.latents, batch.prompt_embeds, places, pixels),
                                        generators)

        return replace(objective, batch_loss=batch_loss)

    def save(self, backbone: Backbone, folder: Path, model_id: str) -> str:
        trained = attached_adapter(backbone.denoiser)
        save_instantbooth(trained.concepts, trained.encoder, folder)
        return "adapter"

    def trained_numbers(self, size: ModelSize, config: InstantBoothConfig) -> int:
        return round(SIZE * size.denoiser)


SIZE = 0.069
"""An adapter's numbers in those of its network: 59 of 860 million for SD 1.5."""


def _check(batch: ConceptBatch, images: int) -> None:
    fits = batch.prompt_embeds.ndim == 3 and batch.places.shape == batch.prompt_embeds.shape[:2]
    if not fits or not len(batch.latents) == len(batch.concepts) == len(batch.places) == images:
        raise InputError(f"expected {images} latents [B,C,h,w], embeddings [B,L,D], places [B,L] and concepts "
                         f"[B,3,S,S], got {[list(t.shape) for t in vars(batch).values()]}")
    if not bool(batch.places.any(dim=1).all()):
        raise InputError("a caption lacks the concept's word: expected it in every one")
