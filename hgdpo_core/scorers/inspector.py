"""The inspector of the figures setting: a second scorer that never ranked a pool (hgdpo_core/figures/inspector.py).

Its score is the calibrated log-odds that an image shows what its caption asks for, whole and sharp. It reads captions
of figures only.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hgdpo_core.built_in import find_scorer_weights, is_built_in
from hgdpo_core.errors import InputError, ModelError
from hgdpo_core.figures.inspector import Inspector, inspect, load_inspector
from hgdpo_core.figures.people import Figure, parse_caption
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.scorers.pixels import Images, check_counts
from hgdpo_core.scorers.weights import check_build, read_empty_tensors, read_tensors

NAME, TITLE = "inspector", "Inspector"
DEFECT_BELOW = 0.0
"""An image that scores below is defective: wrong anatomy, smeared, or not what the caption describes."""

SIZE_PX = 64


class FiguresInspector:
    """A loaded inspector."""

    name = NAME

    def __init__(self, inspector: Inspector, fingerprint: str):
        self.inspector, self.fingerprint = inspector, fingerprint

    def score(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        """Log-odds, float32 [B] on the CPU; images of another size than 64 x 64 are resized first."""
        check_counts(images, prompts)
        given = [image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)) for image in images]
        pixels = [np.asarray(image.convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)) for image in given]
        return inspect(self.inspector, [_read(prompt) for prompt in prompts], np.stack(pixels))


def _read(prompt: str) -> Figure:
    try:
        return parse_caption(prompt)
    except ValueError as error:
        raise InputError(f"scorer inspector knows captions of the figures setting only: {error}") from None


def locate(source: str | None) -> tuple[Path, str]:
    """The folder of the weights, and its fingerprint; None is the built-in one."""
    folder = find_scorer_weights(NAME) if source is None or is_built_in(source) else Path(source).expanduser()
    if not (folder / "model.safetensors").is_file():
        raise ModelError(f"{folder} holds no model.safetensors: expected a folder that `python -m hgdpo_core.figures` "
                         "made, or leave the source out for the shipped one")
    return folder, fingerprint_path(folder)


def check(source: str | None) -> None:
    """ModelError where the header shows that the folder holds no whole inspector."""
    path = locate(source)[0] / "model.safetensors"
    check_build(path, lambda _: Inspector(), None, read_empty_tensors(path))


def load(*, source: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> FiguresInspector:
    """The inspector, always in float32 on the CPU: it is too small to gain from anything else."""
    folder, fingerprint = locate(source)
    check(source)
    read_tensors(folder / "model.safetensors")
    return FiguresInspector(load_inspector(folder), fingerprint)
