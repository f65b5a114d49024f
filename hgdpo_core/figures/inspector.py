"""The inspector: a second scorer beside the judge, of another architecture and trained with another seed.

Where the judge is a transformer that compares a text with an image, this is a small convolutional classifier of images:
it predicts the six attributes, counts arms, legs, heads and loose limbs, and detects smeared images. It never sees a
caption, a pool or an image of the target in training. Its score for a caption is the log-odds that everything the
caption names is there and nothing is wrong.
"""

import json
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .dataset import to_model_range
from .people import VOCABULARIES, Figure

# What can be counted: correct images have 2, 2, 1 and 0, and are not smeared (0).
COUNTS = {"arms": (1, 2, 3), "legs": (1, 2, 3), "heads": (0, 1, 2), "loose": (0, 1), "smeared": (0, 1)}
RIGHT = (2, 2, 1, 0, 0)
SIZES = (*(len(words) for words in VOCABULARIES.values()), *(len(counts) for counts in COUNTS.values()))
BATCH = 256


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut; `stride` 2 halves the image."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv_1(F.silu(self.norm_1(x)))
        return self.shortcut(x) + self.conv_2(F.silu(self.norm_2(inner)))


class Inspector(nn.Module):
    """1.2 million parameters; images `[B,3,64,64]` in [-1, 1] to the logits of each question, `[B,size]` each."""

    calibration: Tensor
    """Temperature and threshold of the log-odds, chosen on validation images; not trained with the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 5, 2, 2)
        self.blocks = nn.Sequential(Block(32, 32, 1), Block(32, 64, 2), Block(64, 64, 1), Block(64, 128, 2),
                                    Block(128, 128, 1))
        self.norm = nn.GroupNorm(8, 128)
        self.hidden = nn.Linear(128 * 16, 256)
        self.heads = nn.Linear(256, sum(SIZES))
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))

    def forward(self, images: Tensor) -> list[Tensor]:
        seen = F.silu(self.norm(self.blocks(self.stem(images))))
        # 4 x 4 cells keep where things are: a limb counts where it is attached.
        cells = F.adaptive_avg_pool2d(seen, 4).flatten(1)
        return list(self.heads(F.silu(self.hidden(cells))).float().split(SIZES, dim=-1))


def log_odds_of(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Log-odds `[B]` that all questions have these answers, `[B,Q]`, taken as independent; at most 30."""
    each = [F.log_softmax(part, dim=-1).gather(1, labels[:, i, None])[:, 0] for i, part in enumerate(logits)]
    log_p = torch.stack(each).sum(0).double().clamp(max=-1e-13)
    return (log_p - torch.log(-torch.expm1(log_p))).float()


def attribute_indices(figure: Figure) -> list[int]:
    """The figure's six attributes as indices into VOCABULARIES."""
    return [words.index(word) for words, word in zip(VOCABULARIES.values(), astuple(figure), strict=True)]


def right_labels(figure: Figure) -> list[int]:
    """The answers for a correct image of the figure, as indices into the questions' options."""
    counts = [counts.index(right) for counts, right in zip(COUNTS.values(), RIGHT, strict=True)]
    return attribute_indices(figure) + counts


@torch.no_grad()
def inspect(inspector: Inspector, figures: list[Figure], images: np.ndarray) -> Tensor:
    """Calibrated log-odds float32 `[B]` that each uint8 image `[B,64,64,3]` shows its figure, whole and sharp; an image
    below 0 is defective."""
    temperature, threshold = inspector.calibration.tolist()
    labels = torch.tensor([right_labels(figure) for figure in figures])
    parts = [log_odds_of(inspector(to_model_range(images[first:first + BATCH])), labels[first:first + BATCH])
             for first in range(0, len(images), BATCH)]
    return (torch.cat(parts) - threshold) / temperature


def save_inspector(inspector: Inspector, folder: Path) -> None:
    """Write the weights in fp16 and a small description."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half().contiguous() for name, value in inspector.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    questions = {**{name: list(words) for name, words in VOCABULARIES.items()}, **COUNTS}
    (folder / "config.json").write_text(json.dumps({"architecture": "inspector", "questions": questions}, indent=1))


def load_inspector(folder: Path, device: str = "cpu") -> Inspector:
    inspector = Inspector()
    inspector.load_state_dict(load_file(folder / "model.safetensors"))
    return inspector.to(device).eval().requires_grad_(False)
