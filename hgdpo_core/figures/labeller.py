"""The labeller: says which of two images of a caption is preferred, for the stand-in pairs of the figures setting.

A public preference data set is labelled by people, who are neither the scorer nor the witness of a comparison. So this
is a third network, used for nothing else and no scorer of runs: plain convolutions over the image, steered (FiLM,
arXiv:1709.07871) by the caption's pairs of neighbouring words, where the judge is a pair of transformers and the
inspector reads no text. Its error rate is in the card of the weights.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .dataset import to_model_range

WORD = re.compile(r"\w+|,")
LENGTH = 24
"""Word pairs of a caption that are read; the longest caption has 20."""
PADDING, UNKNOWN_WORD = 0, 1
TEXT_WIDTH = 128
CHANNELS = (24, 48, 48, 64, 64, 96)
STRIDES = (1, 2, 1, 2, 1, 2)
BATCH = 256
TIE_BAND = 0.1
"""A pair whose probability is nearer to one half than this is a tie: the label is 0.5."""


class Steered(nn.Module):
    """A 3x3 convolution whose normalised output the caption scales and shifts, channel by channel."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs)
        self.steer = nn.Linear(TEXT_WIDTH, 2 * outputs)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        scale, shift = self.steer(text)[..., None, None].chunk(2, dim=1)
        return F.relu(self.norm(self.conv(x)) * (1 + scale) + shift)


class Labeller(nn.Module):
    """0.6 million parameters; a score per image: the higher of two images of one caption is preferred."""

    temperature: Tensor
    """Divides a difference of scores to make it log-odds; chosen on validation pairs, not trained."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__()
        self.words = tuple(words)
        self.ids = {word: i + 2 for i, word in enumerate(self.words)}
        self.first, self.second = (nn.Embedding(len(self.words) + 2, TEXT_WIDTH) for _ in (0, 1))
        self.mix = nn.Linear(TEXT_WIDTH, TEXT_WIDTH)
        self.stem = nn.Conv2d(3, CHANNELS[0], 5, 2, 2)
        widths = zip((CHANNELS[0], *CHANNELS), CHANNELS, STRIDES, strict=False)
        self.layers = nn.ModuleList(Steered(*shape) for shape in widths)
        self.hidden = nn.Linear(CHANNELS[-1] * 16 + TEXT_WIDTH, 192)
        self.score = nn.Linear(192, 1)
        self.register_buffer("temperature", torch.tensor(1.0))

    def word_pairs(self, captions: Sequence[str]) -> Tensor:
        """Each caption's neighbouring words as ids, int64 `[B,LENGTH,2]`, PADDING after the last."""
        pairs = torch.full((len(captions), LENGTH, 2), PADDING)
        for row, caption in zip(pairs, captions, strict=True):
            ids = [self.ids.get(word, UNKNOWN_WORD) for word in WORD.findall(caption.lower())]
            neighbours = list(zip(ids, [*ids, UNKNOWN_WORD][1:], strict=True))[:LENGTH]
            row[:len(neighbours)] = torch.tensor(neighbours, dtype=torch.long).reshape(-1, 2)
        return pairs

    def describe(self, pairs: Tensor, images: Tensor) -> Tensor:
        """What the score is read from, float `[B,192]`: images `[B,3,64,64]` in [-1, 1] beside `word_pairs`."""
        each = F.relu(self.first(pairs[..., 0]) + self.second(pairs[..., 1]))
        text = F.relu(self.mix((each * (pairs[..., :1] != PADDING)).sum(1) / 4))
        seen = self.stem(images)
        for layer in self.layers:
            seen = layer(seen, text)
        return F.relu(self.hidden(torch.cat([seen.flatten(1), text], dim=1)))

    def forward(self, pairs: Tensor, images: Tensor) -> Tensor:
        """Scores, float32 `[B]`."""
        return self.score(self.describe(pairs, images))[:, 0].float()


@torch.no_grad()
def score_images(labeller: Labeller, captions: Sequence[str], images: np.ndarray) -> Tensor:
    """Scores float32 `[B]` of uint8 images `[B,64,64,3]`, comparable among images of one caption only."""
    pairs = labeller.word_pairs(captions)
    parts = [slice(first, first + BATCH) for first in range(0, len(images), BATCH)]
    return torch.cat([labeller(pairs[part], to_model_range(images[part])) for part in parts])


def prefer_first(labeller: Labeller, captions: Sequence[str], first: np.ndarray, second: np.ndarray) -> Tensor:
    """The probability, float32 `[B]`, that the first image of a caption is preferred to the second; uint8
    `[B,64,64,3]` each. Swapping the images gives one minus it."""
    difference = score_images(labeller, captions, first) - score_images(labeller, captions, second)
    return torch.sigmoid(difference / labeller.temperature)


def save_labeller(labeller: Labeller, folder: Path) -> None:
    """Write the weights in fp16, and the words that they know."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half().contiguous() for name, value in labeller.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    config = {"architecture": "labeller", "words": labeller.words}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def load_labeller(folder: Path) -> Labeller:
    """The labeller in `folder`, in float32 on the CPU."""
    labeller = Labeller(json.loads((folder / "config.json").read_text())["words"])
    labeller.load_state_dict(load_file(folder / "model.safetensors"))
    return labeller.eval().requires_grad_(False)
