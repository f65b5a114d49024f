"""Scores of image files outside any store: a folder with captions, or any images and one prompt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hgdpo_core.config import ScorerConfig
from hgdpo_core.devices import default_device
from hgdpo_core.errors import InputError, StoppedError
from hgdpo_core.image_sets.folders import CaptionedImage, find_captioned_images, find_images
from hgdpo_core.images import decode_image
from hgdpo_core.parallel import thread_map
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.scorers import load_configured_scorer
from hgdpo_core.storage.local import open_file


@dataclass(frozen=True)
class ScoredImage:
    """An image with its score, higher is better; nan and a `problem` for a file that is not an image."""

    image: CaptionedImage
    score: float
    problem: str | None = None


def images_to_score(path: str, prompt: str | None = None) -> list[CaptionedImage]:
    """One image file, or every image of a folder, with `prompt` or, without one, the folder's own captions.

    InputError when there is no image, or no prompt for one.
    """
    location = Path(path).expanduser()
    if prompt is not None and not prompt.strip():
        raise InputError("the prompt is empty: describe what the images should show")
    if location.is_file():
        if prompt is None:
            raise InputError(f"{path} is one image: describe what it should show with --prompt")
        return [CaptionedImage(location, prompt)]
    if prompt is None or not location.is_dir():
        return find_captioned_images(str(location))
    return [CaptionedImage(file, prompt) for file in find_images(location)]


def score_images(images: Sequence[CaptionedImage], scorer: ScorerConfig, *, device: str | None = None,
                 progress: Progress = silent, should_stop: ShouldStop = never_stop) -> list[ScoredImage]:
    """Every image with its score, in their order."""
    loaded = load_configured_scorer(scorer, device or default_device())
    scored: list[ScoredImage] = []
    for first in range(0, len(images), scorer.batch_size):
        if should_stop():
            raise StoppedError("stopped while scoring images")
        batch = images[first:first + scorer.batch_size]
        opened = list(thread_map(lambda image: _open(image.path), batch))
        good = [(pixels, image.caption) for pixels, image in zip(opened, batch, strict=True)
                if isinstance(pixels, Image.Image)]
        scores = iter(loaded.score(*zip(*good, strict=True)).tolist() if good else ())
        scored += [ScoredImage(image, math.nan, problem) if isinstance(problem, str)
                   else ScoredImage(image, next(scores)) for problem, image in zip(opened, batch, strict=True)]
        progress(len(scored), len(images), "images")
    return scored


def _open(path: Path) -> Image.Image | str:
    """The image, or why there is none."""
    try:
        with open_file(path) as file:
            return decode_image(file.read())
    except (InputError, OSError) as error:
        return str(error)
