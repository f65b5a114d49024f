"""Train the inspector on the same kind of pairs as the judge, with images, seeds and a network of its own."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from ..dataset import to_model_range
from ..inspector import Inspector, inspect, save_inspector
from ..people import parse_caption
from ..renderer import DEFECTS
from .judge_data import Pairs, augment, cached_pairs, make_pairs
from .loop import Plan, train

PLAN = Plan(steps=2000, batch=64, learning_rate=1.5e-3, weight_decay=0.02)
PAIRS = 10000
VALIDATION_PAIRS = 2000
SEED = 1000  # apart from the judge's
TRAINING_KINDS = (*DEFECTS[:-2], "missing_limb", "missing_limb", "detached_limb", "extra_limb", "smeared")


def sample_images(pairs: Pairs, batch: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Images `[B,3,64,64]` in [-1, 1] and their answers `[B,11]`: either side, clean or through the VAE, augmented."""
    chosen = torch.from_numpy(rng.integers(len(pairs.captions), size=batch))
    side = torch.from_numpy(rng.integers(2, size=batch))
    through = torch.from_numpy(rng.random(batch) < 0.65)[:, None, None, None]
    images = torch.where(through, pairs.decoded[chosen, side], pairs.clean[chosen, side])
    answers = torch.cat([pairs.attributes[chosen, side], pairs.counts[chosen, side]], dim=-1)
    return augment(to_model_range(images.numpy()), rng)[0], answers


def train_inspector(folder: Path, vae: AutoencoderKL, plan: Plan, *, pairs: int, seed: int, work: Path) -> None:
    """Train the inspector, choose its threshold on validation pairs, and write it."""
    seed += SEED
    data = cached_pairs(work / "pairs.safetensors",
                        lambda: make_pairs(vae, pairs, split="train", seed=seed, kinds=TRAINING_KINDS))
    torch.manual_seed(seed)

    def loss_of(rng: np.random.Generator, _: torch.Generator) -> Tensor:
        images, answers = sample_images(data, plan.batch, rng)
        losses = [F.cross_entropy(logits, answers[:, i]) for i, logits in enumerate(inspector(images))]
        return torch.stack(losses).sum()

    inspector = Inspector()
    average = train(inspector, loss_of, plan, name="inspector", seed=seed, checkpoint=work / "checkpoint.pt")
    count = max(pairs * VALIDATION_PAIRS // PAIRS, 4)
    held_out = cached_pairs(work / "validation.safetensors",
                            lambda: make_pairs(vae, count, split="validation", seed=seed, kinds=TRAINING_KINDS))
    calibrate(average, held_out)
    save_inspector(average, folder)


def calibrate(inspector: Inspector, pairs: Pairs) -> None:
    """Choose the threshold that separates correct from broken images best (the mean of both rates), and a temperature
    that makes the scores' standard deviation one, so that scores are readable."""
    figures = [parse_caption(text) for text in pairs.captions]
    right, broken = (inspect(inspector, figures, pairs.decoded[:, side].numpy()) for side in (0, 1))
    candidates = torch.cat([right, broken]).quantile(torch.linspace(0.02, 0.98, 97))
    rates = [float((right >= c).float().mean() + (broken < c).float().mean()) for c in candidates]
    threshold = float(candidates[int(np.argmax(rates))])
    inspector.calibration = torch.tensor([float(torch.cat([right, broken]).std().clamp(min=1e-3)), threshold])
