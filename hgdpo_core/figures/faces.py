"""Finds the faces of drawn people, as a detector finds those of photographs: what it looks for is drawn, not trained.

Faces without hair are drawn in each skin and some sizes; where their lower part, eyes to mouth, correlates with an
image, there is a head. Nothing is kept in a file.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageDraw

from .renderer import CANVAS_PX, SKINS, Palette, draw_shape, head_shapes
from .skeleton import BUILDS

VERSION = "figures-1"
"""Raised by hand when other boxes are found: it stands for the finder in ids."""
SIDE = 64
"""Pixels of the longer side of the image as it is searched."""
RADII = (6.5, 7.25, 8.0, 8.75, 9.5)
"""Of heads, in pixels of an image of SIDE."""
HAIR = 1.3
"""Half the box of a head with its hair, in radii of the head."""
LEAST = 0.62
"""Correlation from which on it is a face: chosen on validation people, see tests/core/figures/test_figures_faces.py."""

Box = tuple[float, float, float, float]


class _Template(NamedTuple):
    radius: float
    pixels: np.ndarray
    """float32 [3 * h * w], each channel of mean 0, all of length 1."""
    centre: int
    """Rows from its first one to the head's centre."""


def find_faces(image: Image.Image) -> list[Box]:
    """Boxes (left, top, width, height) of heads with their hair in pixels of the image, the largest first."""
    scale = max(image.size) / SIDE
    size = [max(1, round(side / scale)) for side in image.size]
    pixels = np.asarray(image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BOX), dtype=np.float32)
    found: list[tuple[float, float, float, float]] = []
    for score, x, y, radius in sorted(_candidates(pixels), reverse=True):
        if all((x - other[1]) ** 2 + (y - other[2]) ** 2 > (radius + other[3]) ** 2 for other in found):
            found.append((score, x, y, radius))
    boxes = [((x - HAIR * r) * scale, (y - HAIR * r) * scale, 2 * HAIR * r * scale, 2 * HAIR * r * scale)
             for _, x, y, r in found]
    return sorted(boxes, key=lambda box: -box[2])


def _candidates(pixels: np.ndarray) -> Iterator[tuple[float, float, float, float]]:
    """Correlation, centre and radius of each place that may be a face."""
    for (height, width), templates in _templates().items():
        if pixels.shape[0] < height or pixels.shape[1] < width:
            continue
        windows = sliding_window_view(pixels, (height, width), axis=(0, 1))
        flat = windows.reshape(-1, 3, height * width)
        length = np.sqrt(height * width * flat.var(axis=-1).sum(axis=-1)) + 1e-3
        match = flat.reshape(len(flat), -1) @ np.stack([each.pixels for each in templates], axis=-1) / length[:, None]
        for place, number in np.argwhere(match >= LEAST):
            row, column = divmod(int(place), windows.shape[1])
            yield (float(match[place, number]), column + width / 2, row + templates[number].centre,
                   templates[number].radius)


@functools.cache
def _templates() -> dict[tuple[int, int], list[_Template]]:
    """By their height and width."""
    grouped: dict[tuple[int, int], list[_Template]] = {}
    for radius in RADII:
        above, below, half = round(0.2 * radius), round(0.8 * radius), round(0.75 * radius)
        for skin in SKINS:
            head = _draw_head(radius, skin)
            middle = len(head) // 2
            pixels = head[middle - above:middle + below, middle - half:middle + half]
            pixels = (pixels - pixels.mean(axis=(0, 1))).transpose(2, 0, 1).ravel()
            grouped.setdefault((above + below, 2 * half), []).append(
                _Template(radius, pixels / np.linalg.norm(pixels), above))
    return grouped


def _draw_head(radius: float, skin: tuple[int, int, int]) -> np.ndarray:
    """A face without hair in the middle of its own skin colour, float32 [S, S, 3]."""
    build, centre = BUILDS["woman"], CANVAS_PX / 2
    canvas = Image.new("RGB", (CANVAS_PX, CANVAS_PX), skin)
    draw = ImageDraw.Draw(canvas)
    for shape in head_shapes("woman", (centre, centre), build, Palette(skin, skin, skin, skin), cheer=0.4):
        draw_shape(draw, shape, 0, shape.colour)
    side = 2 * round(CANVAS_PX * radius / build.head / 2)  # so drawn, the head has this radius
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX), dtype=np.float32)
