"""Train the labeller on rendered pairs of both styles, with seeds, data and a network of its own."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..dataset import to_model_range
from ..foreign.prompts import sample_scenes, scene_caption
from ..labeller import WORD, Labeller, save_labeller, score_images
from .judge_data import augment
from .labeller_data import KINDS, TRAINING_KINDS, LabelledPairs, cached_pairs, make_labelled_pairs
from .loop import Plan, train

PLAN = Plan(steps=1000, batch=32, learning_rate=2e-3, weight_decay=0.02)
PAIRS = 5000
VALIDATION_PAIRS = 400
SEED = 3000  # apart from those of all other networks
KINDS_WEIGHT = 0.5


def known_words() -> list[str]:
    """All words of the captions of figures and still lives, sorted."""
    scenes = [scene for share in (0.0, 1.0)
              for scene in sample_scenes("train", 4000, np.random.default_rng(0), without_people=share)]
    return sorted({word for scene in scenes for word in WORD.findall(scene_caption(scene))})


class LabellerWithKinds(nn.Module):
    """The labeller, and for its training a head that names the defect; the last class is none."""

    def __init__(self, labeller: Labeller) -> None:
        super().__init__()
        self.labeller = labeller
        self.kinds = nn.Linear(labeller.score.in_features, len(KINDS) + 1)

    def forward(self, pairs: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores float32 `[B]` and the logits of the defects `[B,K+1]`."""
        seen = self.labeller.describe(pairs, images)
        return self.labeller.score(seen)[:, 0].float(), self.kinds(seen).float()


def labeller_loss(model: LabellerWithKinds, pairs: Tensor, images: Tensor, kinds: Tensor) -> Tensor:
    """-log of the probability that the correct image is preferred, and cross entropy of the defects' names. `pairs`
    `[2B,L,2]` and images `[2B,3,64,64]`, the correct ones first; `kinds` `[B]`."""
    scores, named = model(pairs, images)
    right, other = scores.chunk(2)
    truth = torch.cat([torch.full_like(kinds, len(KINDS)), kinds])
    return F.softplus(other - right).mean() + KINDS_WEIGHT * F.cross_entropy(named, truth)


def sample_batch(pairs: LabelledPairs, batch: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The indices `[B]` of random pairs, and their images `[2B,3,64,64]` in [-1, 1], the correct ones first: each pair
    clean or through the VAE, mirrored or not, shifted by up to two pixels."""
    chosen = torch.from_numpy(rng.integers(len(pairs.captions), size=batch))
    through = torch.from_numpy(rng.random(batch) < 0.7)[:, None, None, None, None]
    images = torch.where(through, pairs.decoded[chosen], pairs.clean[chosen])
    images = to_model_range(images.transpose(0, 1).reshape(2 * batch, 64, 64, 3).numpy())
    return chosen, augment(images, rng)[0]


def train_labeller(folder: Path, vae: AutoencoderKL, plan: Plan, *, pairs: int, seed: int, work: Path) -> None:
    """Train the labeller, choose its temperature on validation pairs, and write it."""
    seed += SEED
    data = cached_pairs(work / "pairs.safetensors",
                        lambda: make_labelled_pairs(vae, pairs, split="train", seed=seed, kinds=TRAINING_KINDS))
    torch.manual_seed(seed)
    model = LabellerWithKinds(Labeller(known_words()))
    words = model.labeller.word_pairs(data.captions)

    def loss_of(rng: np.random.Generator, _: torch.Generator) -> Tensor:
        chosen, images = sample_batch(data, plan.batch, rng)
        return labeller_loss(model, words[chosen].repeat(2, 1, 1), images, data.kinds[chosen])

    average = train(model, loss_of, plan, name="labeller", seed=seed, checkpoint=work / "checkpoint.pt").labeller
    count = max(pairs * VALIDATION_PAIRS // PAIRS, 10)
    average.temperature = choose_temperature(average, cached_pairs(
        work / "validation.safetensors", lambda: make_labelled_pairs(vae, count, split="validation", seed=seed)))
    save_labeller(average, folder)


def choose_temperature(labeller: Labeller, pairs: LabelledPairs) -> Tensor:
    """The temperature under which the pairs through the VAE are likeliest (Guo et al. 2017, arXiv:1706.04599)."""
    right, other = (score_images(labeller, pairs.captions, pairs.decoded[:, side].numpy()) for side in (0, 1))
    candidates = torch.logspace(-1, 2, 121)
    losses = F.softplus((other - right)[:, None] / candidates).mean(0)
    return candidates[losses.argmin()]
