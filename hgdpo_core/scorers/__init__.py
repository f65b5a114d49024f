"""Judges of images behind one small interface: `load_scorer(name).score(images, prompts)`."""

from collections.abc import Sequence
from types import ModuleType
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image

from hgdpo_core.errors import ConfigError
from hgdpo_core.scorers import inspector, pickscore, tinted

Images = Sequence[Image.Image] | np.ndarray | torch.Tensor


class Scorer(Protocol):
    """A judge: higher is better. `fingerprint` tells one version of its weights from another."""

    name: str
    fingerprint: str

    def score(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [B] on the CPU for B images (PIL, or uint8 [B, H, W, 3]) and their B prompts."""
        ...


SCORERS: dict[str, ModuleType] = {"inspector": inspector, "pickscore": pickscore, "tinted": tinted}
"""Each module offers `locate(source)`, whose last item is the fingerprint, and `load(source=, device=, dtype=)`.

One that can tell a defective image declares DEFECT_BELOW: an image that scores below is defective."""


def load_scorer(name: str, *, source: str | None = None, device: str = "cpu",
                dtype: torch.dtype = torch.float32) -> Scorer:
    """A scorer by name; `source` is a hub id or folder, "figures" the built-in judge, None the public checkpoint."""
    return _module(name).load(source=source, device=device, dtype=dtype)


def find_scorer(name: str, source: str | None) -> str:
    """The fingerprint of a scorer without loading it; ModelError when its weights are not to be had."""
    return _module(name).locate(source)[-1]


def defect_limit(name: str) -> float | None:
    """The score under which an image is defective, for scorers that can tell; None for those that only rank."""
    return getattr(_module(name), "DEFECT_BELOW", None)


@runtime_checkable
class ImageEmbedder(Protocol):
    """A judge with an image tower of its own, whose features tell how much images differ."""

    def embed_images(self, images: Images) -> torch.Tensor:
        """L2-normalised float32 [B, D] of B images (PIL, or uint8 [B, H, W, 3])."""
        ...


def load_embedder(name: str, *, source: str | None = None, device: str = "cpu",
                  dtype: torch.dtype = torch.float32) -> ImageEmbedder:
    """The image tower of a scorer; ConfigError for a scorer that has none."""
    scorer = load_scorer(name, source=source, device=device, dtype=dtype)
    if not isinstance(scorer, ImageEmbedder):
        raise ConfigError(f"scorer {name} has no image features of its own: use pickscore")
    return scorer


def _module(name: str) -> ModuleType:
    if name not in SCORERS:
        raise ConfigError(f"there is no scorer {name!r}; there are {', '.join(sorted(SCORERS))}")
    return SCORERS[name]
