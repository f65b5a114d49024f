"""Train the inspector on the same kind of pairs as the judge, with pictures, seeds and a network of its own."""

from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from ..inspector import Inspector, inspect, save_inspector
from ..people import parse_caption
from ..renderer import DEFECTS
from .judge_data import Pairs, load_pairs, make_pairs, save_pairs
from .loop import Plan, train

PLAN = Plan(steps=2000, batch=64, learning_rate=1.5e-3, weight_decay=0.02)
PAIRS = 10000
VALIDATION_PAIRS = 2000
SEED = 1000  # apart from the judge's
TRAINING_KINDS = (*DEFECTS[:-2], "missing_limb", "missing_limb", "detached_limb", "extra_limb", "smeared")
SHIFT_PX = 2


def sample_pictures(pairs: Pairs, batch: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pictures `[B,3,64,64]` in [-1, 1] and their answers `[B,11]`: of either side, clean or through the VAE,
    mirrored or not, shifted."""
    chosen = torch.from_numpy(rng.integers(len(pairs.captions), size=batch))
    side = torch.from_numpy(rng.integers(2, size=batch))
    through = torch.from_numpy(rng.random(batch) < 0.65)[:, None, None, None]
    images = torch.where(through, pairs.decoded[chosen, side], pairs.clean[chosen, side])
    images = images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
    mirrored = torch.from_numpy(rng.random(batch) < 0.5)[:, None, None, None]
    images = F.pad(torch.where(mirrored, images.flip(-1), images), (SHIFT_PX,) * 4, mode="replicate")
    x, y = rng.integers(2 * SHIFT_PX + 1, size=2)
    answers = torch.cat([pairs.attributes[chosen, side], pairs.counts[chosen, side]], dim=-1)
    return images[..., y : y + 64, x : x + 64].contiguous(), answers


def train_inspector(folder: Path, vae: AutoencoderKL, plan: Plan, *, pairs: int, seed: int, work: Path) -> None:
    """Train the inspector, choose its threshold on validation pairs, and write it."""
    data = cached_pairs(work / "pairs.safetensors", vae, pairs, "train", seed + SEED)
    torch.manual_seed(seed + SEED)

    def loss_of(rng: np.random.Generator, _: torch.Generator) -> Tensor:
        pictures, answers = sample_pictures(data, plan.batch, rng)
        losses = [F.cross_entropy(logits, answers[:, i]) for i, logits in enumerate(inspector(pictures))]
        return torch.stack(losses).sum()

    inspector = Inspector()
    checkpoint = work / "checkpoint.pt"
    average = train(inspector, loss_of, plan, name="inspector", seed=seed + SEED, checkpoint=checkpoint)
    count = max(pairs * VALIDATION_PAIRS // PAIRS, 4)
    held_out = cached_pairs(work / "validation.safetensors", vae, count, "validation", seed + SEED)
    calibrate(cast(Inspector, average), held_out)
    save_inspector(cast(Inspector, average), folder)


def cached_pairs(path: Path, vae: AutoencoderKL, count: int, split: str, seed: int) -> Pairs:
    if not path.exists():
        save_pairs(make_pairs(vae, count, split=split, seed=seed, kinds=TRAINING_KINDS), path)
    return load_pairs(path)


def calibrate(inspector: Inspector, pairs: Pairs) -> None:
    """Choose the threshold that tells right from broken pictures best (the mean of both shares), and a temperature
    that makes the spread of the scores one, so that scores are readable."""
    figures = [parse_caption(text) for text in pairs.captions]
    right, broken = (inspect(inspector, figures, pairs.decoded[:, side].numpy()) for side in (0, 1))
    candidates = torch.cat([right, broken]).quantile(torch.linspace(0.02, 0.98, 97))
    shares = [float((right >= c).float().mean() + (broken < c).float().mean()) for c in candidates]
    threshold = float(candidates[int(np.argmax(shares))])
    inspector.calibration = torch.tensor([float(torch.cat([right, broken]).std().clamp(min=1e-3)), threshold])
