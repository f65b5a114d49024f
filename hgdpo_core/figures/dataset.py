"""Rendered images in bulk: an image folder on disk for users, and arrays in memory for training the weights."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .people import Figure, caption, figures_of
from .renderer import render, render_with_mask

# Seeds of evaluation images begin here, so that no training image has one of them.
HELD_OUT_SEED = 2**40


def write_image_folder(path: str | Path, count: int, seed: int, split: str = "train") -> Path:
    """Write `count` correct images of a split as PNG files beside a `metadata.jsonl` (columns file_name, text).

    This is the image folder that `datasets.load_dataset("imagefolder", ...)` reads and users bring as SFT data.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for i, figure in enumerate(sample_figures(split, count, rng)):
        name = f"{i:05d}.png"
        render(figure, int(rng.integers(2**32))).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption(figure)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def sample_figures(split: str, count: int, rng: np.random.Generator) -> list[Figure]:
    """`count` figures of a split, drawn with replacement."""
    figures = figures_of(split)
    return [figures[i] for i in rng.integers(len(figures), size=count)]


def render_batch(figures: Sequence[Figure], seeds: Sequence[int],
                 defects: Sequence[str | None] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `[B,64,64,3]` and the masks of their people uint8 `[B,64,64]` (255 on the person)."""
    defects = defects or [None] * len(figures)
    rendered = [render_with_mask(f, s, defect=d) for f, s, d in zip(figures, seeds, defects, strict=True)]
    images, masks = (np.stack([np.asarray(image) for image in kind]) for kind in zip(*rendered, strict=True))
    return images, masks


def to_model_range(images: np.ndarray) -> Tensor:
    """uint8 `[B,H,W,3]` to float32 `[B,3,H,W]` in [-1, 1], the range of the VAE."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float().div(127.5).sub(1)


def to_pixels(images: Tensor) -> np.ndarray:
    """Float `[B,3,H,W]` in [-1, 1] to uint8 `[B,H,W,3]`; values outside are clipped."""
    pixels = images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()
