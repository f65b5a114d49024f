"""Pairs to train judges on: for one caption a correct image and another with a defect, clean and through the VAE.

A judge will rank what the target generates, and that always comes out of the VAE, often from latents that are not quite
right. So each image is kept twice: as rendered, and decoded from latents with a little noise on them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from ..dataset import render_batch, sample_figures, to_pixels
from ..inspector import COUNTS, attribute_indices
from ..people import VOCABULARIES, Figure, caption, parse_caption
from ..renderer import DEFECTS, alter_figure, count_parts, render_parts
from .loop import in_batches, save_tensors
from .vae import decode, encode

# A defect of a target's images that cannot be rendered: latents far from any image's.
SMEARED = "smeared"
KINDS = (*DEFECTS, SMEARED)
# The label of what is not known: what a target really generated.
UNKNOWN = -100

# Standard deviations of the noise on latents of unit deviation.
LITTLE_NOISE = 0.3
MUCH_NOISE = (0.5, 1.0)
SHIFT_PX = 2


@dataclass(frozen=True)
class Pairs:
    """N pairs. Index 0 of the second axis is the correct image, index 1 the other one."""

    captions: list[str]
    clean: Tensor  # uint8 [N,2,64,64,3]
    decoded: Tensor  # uint8 [N,2,64,64,3]
    kinds: Tensor  # int64 [N], index into KINDS
    attributes: Tensor  # int64 [N,2,6], what is really rendered, indices into VOCABULARIES
    counts: Tensor  # int64 [N,2,5], indices into the options of COUNTS
    parts: Tensor  # uint8 [N,2,8,8,4], how much of each 8 x 8 pixels each of PARTS covers, 255 is all


def count_indices(seed: int, defect: str | None, smeared: bool) -> list[int]:
    found = {**count_parts(seed, defect), "smeared": int(smeared)}
    return [options.index(found[name]) for name, options in COUNTS.items()]


def draw_pair(figure: Figure, kind: str, rng: np.random.Generator, seed_base: int) -> list[tuple[int, str | None]]:
    """The (seed, defect) of both images. Half of the pairs share a seed, so that they differ by the defect only."""
    first = seed_base + int(rng.integers(2**32))
    second = first if rng.random() < 0.5 else seed_base + int(rng.integers(2**32))
    return [(first, None), (second, None if kind == SMEARED else kind)]


def make_pairs(vae: AutoencoderKL, count: int, *, split: str, seed: int, kinds: tuple[str, ...] = KINDS) -> Pairs:
    """Render `count` pairs, the kinds in turn, and pass them through the VAE."""
    rng = np.random.default_rng([seed, 77])
    figures = sample_figures(split, count, rng)
    names = [kinds[i % len(kinds)] for i in range(count)]
    # Above every training seed of the other splits: no two splits share an image.
    base = {"train": 0, "validation": 2**41, "test": 2**42}[split]
    pairs = [draw_pair(figure, kind, rng, base) for figure, kind in zip(figures, names, strict=True)]
    clean = np.empty((count, 2, 64, 64, 3), dtype=np.uint8)
    for part in in_batches(count, 256, "judge: render"):
        for i in range(part.start, part.stop):
            seeds, defects = zip(*pairs[i], strict=True)
            clean[i] = render_batch([figures[i]] * 2, seeds, defects)[0]
    indices = torch.tensor([KINDS.index(name) for name in names])
    decoded = pass_through(vae, clean, indices, seed)
    smeared = indices == KINDS.index(SMEARED)
    images = torch.from_numpy(clean)
    images[smeared, 1] = decoded[smeared, 1]
    altered = [[f, alter_figure(f, s, d)] for f, (_, (s, d)) in zip(figures, pairs, strict=True)]
    attributes = torch.tensor([[attribute_indices(f) for f in pair] for pair in altered])
    counts = torch.tensor([[count_indices(*right, False), count_indices(*other, name == SMEARED)]
                           for (right, other), name in zip(pairs, names, strict=True)])
    covered = [[render_parts(f, s, defect=d) for s, d in pair] for f, pair in zip(figures, pairs, strict=True)]
    parts = torch.from_numpy(np.rint(255 * np.array(covered)).astype(np.uint8))
    return Pairs([caption(f) for f in figures], images, decoded, indices, attributes, counts, parts)


def pass_through(vae: AutoencoderKL, clean: np.ndarray, kinds: Tensor, seed: int) -> Tensor:
    """uint8 `[N,2,64,64,3]` encoded, half of them made a little noisy (the smeared very), and decoded."""
    count = len(clean)
    generator = torch.Generator().manual_seed(seed)
    scale = float(vae.config["scaling_factor"])
    latents = encode(vae, clean.reshape(-1, 64, 64, 3), name="judge: encode") * scale
    amount = LITTLE_NOISE * torch.rand(count, 2, generator=generator)
    amount *= torch.rand(count, 2, generator=generator) < 0.5
    low, high = MUCH_NOISE
    smeared = kinds == KINDS.index(SMEARED)
    amount[smeared, 1] = low + (high - low) * torch.rand(int(smeared.sum()), generator=generator)
    latents += amount.reshape(-1, 1, 1, 1) * torch.randn(latents.shape, generator=generator)
    decoded = [to_pixels(decode(vae, latents[p] / scale)) for p in in_batches(2 * count, 64, "judge: decode")]
    return torch.from_numpy(np.concatenate(decoded)).reshape(count, 2, 64, 64, 3)


def save_pairs(pairs: Pairs, path: Path) -> None:
    asked = torch.tensor([attribute_indices(parse_caption(text)) for text in pairs.captions])
    tensors = {name: value.contiguous() for name, value in vars(pairs).items() if name != "captions"}
    save_tensors(path, {"asked": asked, **tensors})


def load_pairs(path: Path) -> Pairs:
    tensors = load_file(path)
    words = list(VOCABULARIES.values())
    figures = [Figure(*(vocabulary[i] for vocabulary, i in zip(words, row, strict=True)))
               for row in tensors.pop("asked").tolist()]
    return Pairs([caption(figure) for figure in figures], **tensors)


def cached_pairs(path: Path, make: Callable[[], Pairs]) -> Pairs:
    """The pairs in `path`, made first where the file is missing."""
    if not path.exists():
        save_pairs(make(), path)
    return load_pairs(path)


def augment(images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The images `[B,3,64,64]`, mirrored or not, shifted by up to two pixels; and which are mirrored, bool `[B]`."""
    mirrored = torch.from_numpy(rng.random(len(images)) < 0.5)
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images, (SHIFT_PX,) * 4, mode="replicate")
    x, y = rng.integers(2 * SHIFT_PX + 1, size=2)
    return padded[..., y:y + 64, x:x + 64].contiguous(), mirrored
