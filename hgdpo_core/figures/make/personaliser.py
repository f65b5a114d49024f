"""Train the figures setting's InstantBooth adapter, by the objective that users train theirs with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from hgdpo_core.config import InstantBoothConfig, TargetConfig
from hgdpo_core.models import Backbone, find_model, load_backbone
from hgdpo_core.models.instantbooth import (
    ENCODER,
    ImageEncoder,
    InstantBoothDenoiser,
    concept_places,
    save_concepts,
)
from hgdpo_core.storage import Store
from hgdpo_core.training.base import Hooks, TrainingResult
from hgdpo_core.training.checkpoints import Checkpoints
from hgdpo_core.training.data import epoch_order
from hgdpo_core.training.instantbooth import ConceptBatch, prepare_instantbooth
from hgdpo_core.training.loop import run_training

from ..dataset import to_model_range
from ..identities import CONCEPT_WORD, View, concept_image, draw_people, draw_view
from .loop import Plan, in_batches, save_tensors
from .vae import encode, load_vae

IMAGES = 10000
SEED = 5000  # apart from the other networks'
PLAN = Plan(steps=750, batch=32, learning_rate=1e-3, warm_up=100)


def draw_pairs(count: int, seed: int) -> list[tuple[View, View]]:
    """Two images of each of `count` people of the adapter's split: what is learnt, and the concept."""
    rng = np.random.default_rng([seed, 55])
    people = draw_people("adapter", rng)
    return [(draw_view(person, rng), draw_view(person, rng)) for person, _ in zip(people, range(count), strict=False)]


def render_pairs(vae: AutoencoderKL, count: int, *, seed: int, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Scaled latents `[N,8,8,8]`, concept images uint8 `[N,64,64,3]` of the same people, and the prompts."""
    pairs = draw_pairs(count, seed)
    if not path.exists():
        images, concepts = [], []
        for part in in_batches(count, 256, "adapter: render"):
            images += [np.asarray(view.render()[0]) for view, _ in pairs[part]]
            concepts += [np.asarray(concept_image(other)) for _, other in pairs[part]]
        latents = encode(vae, np.stack(images), name="adapter: encode") * float(vae.config["scaling_factor"])
        save_tensors(path, {"latents": latents, "concepts": torch.from_numpy(np.stack(concepts))})
    return load_file(path), [view.prompt() for view, _ in pairs]


@dataclass(frozen=True)
class RenderedConcepts:
    """Images of people beside their concepts, as the objective reads them."""

    tensors: dict[str, Tensor]
    embeds: Tensor
    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        return epoch_order(len(self), seed, epoch)

    def batch(self, indices: Sequence[int]) -> ConceptBatch:
        rows = torch.tensor(indices)
        return ConceptBatch(self.tensors["latents"][rows], self.embeds[rows], self.places[rows],
                            to_model_range(self.tensors["concepts"][rows].numpy()))


def read_prompts(backbone: Backbone, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings `[N,L,D]` of prompts, and where each has the concept's word, bool `[N,L]`."""
    distinct = list(dict.fromkeys(prompts))
    embeds = torch.cat([each.embeds for each in backbone.text.encode(distinct)]).float()
    places = torch.stack(concept_places(backbone.text, distinct, CONCEPT_WORD))
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
    return embeds[rows], places[rows]


def settings_of(plan: Plan, seed: int) -> InstantBoothConfig:
    """The objective's settings; the learning rate stays what it is after the warm-up."""
    return InstantBoothConfig(max_steps=plan.steps, batch_size=plan.batch, learning_rate=plan.learning_rate,
                              linear_learning_rate=plan.learning_rate, gate_learning_rate=10 * plan.learning_rate,
                              warmup_steps=plan.warm_up, concept_word=CONCEPT_WORD, mixed_precision="no", seed=seed,
                              log_every=50, checkpoint_every=250)


def train_personaliser(folder: Path, target: Path, plan: Plan, *, images: int, seed: int, work: Path) -> TrainingResult:
    """Train the adapter beside the frozen target, on people of its own split, and write it in fp16 into `folder`, which
    holds its image encoder."""
    backbone = load_backbone(find_model(TargetConfig(source=str(target))), dtype="float32")
    tensors, prompts = render_pairs(load_vae(target / "vae"), images, seed=seed + SEED,
                                    path=work / "pairs.safetensors")
    source = RenderedConcepts(tensors, *read_prompts(backbone, prompts))
    settings = settings_of(plan, seed)
    encoder = ImageEncoder.load(folder / ENCODER)
    objective = prepare_instantbooth(backbone.denoiser, backbone.schedule, settings, encoder)
    with tqdm(total=plan.steps, desc="personaliser", mininterval=2) as bar:
        def show(done: int, total: int, unit: str) -> None:
            bar.update(done - bar.n)

        result = run_training(objective, source, settings, Checkpoints(Store(str(work)), "checkpoints"),
                              Hooks(progress=show))
    assert isinstance(objective.denoiser, InstantBoothDenoiser)
    save_concepts(objective.denoiser.concepts, folder, torch.float16)
    return result
