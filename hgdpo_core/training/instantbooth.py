"""InstantBooth: adapters that read a person's image, trained beside a frozen target (arXiv:2304.03411).

Ours where its paper is silent, see `models/instantbooth.py`; no caption is dropped, as guidance's other branch has no
adapter. The image encoder reads each concept turned, scaled, moved and mirrored, another way each time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hgdpo_core.config import InstantBoothConfig
from hgdpo_core.errors import InputError
from hgdpo_core.models import Conditioning
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
)
from hgdpo_core.training.base import Objective
from hgdpo_core.training.parts import Generators, cast_frozen, draw_noise, resolve_precision
from hgdpo_core.training.sft import prediction_error

TURN, ZOOM, SHIFT = 15.0, 0.15, 0.15
"""Most of what a concept is turned by (degrees), scaled by (fraction) and moved by (of half its side)."""


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
    trained = InstantBoothDenoiser(network, concepts.to(network.device))
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
    angle, zoom, x, y = ((draws[:, i] * 2 - 1) * most for i, most in enumerate((math.radians(TURN), ZOOM, SHIFT, SHIFT)))
    scale, side = 1 + zoom, torch.where(draws[:, 4] < 0.5, -1.0, 1.0)
    rows = [torch.stack([side * scale * angle.cos(), -scale * angle.sin(), x], dim=-1),
            torch.stack([side * scale * angle.sin(), scale * angle.cos(), y], dim=-1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(concepts.shape), align_corners=False)
    return F.grid_sample(concepts, grid, padding_mode="border", align_corners=False)


def _check(batch: ConceptBatch, images: int) -> None:
    fits = batch.prompt_embeds.ndim == 3 and batch.places.shape == batch.prompt_embeds.shape[:2]
    if not fits or not len(batch.latents) == len(batch.concepts) == len(batch.places) == images:
        raise InputError(f"expected {images} latents [B,C,h,w], embeddings [B,L,D], places [B,L] and concepts "
                         f"[B,3,S,S], got {[list(t.shape) for t in vars(batch).values()]}")
    if not bool(batch.places.any(dim=1).all()):
        raise InputError("a caption lacks the concept's word: expected it in every one")
