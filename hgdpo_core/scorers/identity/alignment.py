"""Faces cut out of images: turned and scaled so that their five points lie where a recogniser expects them."""

from itertools import product

import numpy as np
from PIL import Image

TEMPLATE = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655),
                     (70.7299, 92.2041)])
"""Of 112x112 pixels, counted from the centre of the first: the eyes, the nose, the mouth (ArcFace's and SFace's)."""
SIDE = 112


def align_face(image: Image.Image, points: np.ndarray) -> np.ndarray:
    """uint8 [112, 112, 3]: the face whose five points [5, 2] are moved onto the template."""
    inverse = np.linalg.inv(np.vstack([fit_similarity(points, TEMPLATE), (0, 0, 1)]))
    rows, columns = np.mgrid[:SIDE, :SIDE]
    places = np.stack([columns, rows], axis=-1) @ inverse[:2, :2].T + inverse[:2, 2]
    return sample_pixels(np.asarray(image.convert("RGB")), places)


def sample_pixels(pixels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """uint8 [..., 3]: an image's values at places [..., 2] (x, y; from the centre of the first pixel), bilinear.

    Black outside. Pillow's own transform cuts fractions off, which darkens a face by half a value.
    """
    height, width = pixels.shape[:2]
    first = np.floor(places).astype(int)
    right, below = np.moveaxis(places - first, -1, 0)[..., None]
    total = np.zeros((*places.shape[:-1], 3))
    for x_step, y_step in product((0, 1), repeat=2):
        x, y = first[..., 0] + x_step, first[..., 1] + y_step
        inside = ((x >= 0) & (x < width) & (y >= 0) & (y < height))[..., None]
        weight = (right if x_step else 1 - right) * (below if y_step else 1 - below)
        total += inside * weight * pixels[y.clip(0, height - 1), x.clip(0, width - 1)]
    return total.round().astype(np.uint8)


def fit_similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[2, 3]: scale, rotation and shift, without reflection, that bring points [N, 2] closest to others."""
    rows, ones, zeros = source.astype(np.float64), np.ones(len(source)), np.zeros(len(source))
    x, y = rows.T
    equations = np.concatenate([np.stack([x, -y, ones, zeros], axis=1), np.stack([y, x, zeros, ones], axis=1)])
    (a, b, c, d), *_ = np.linalg.lstsq(equations, target.T.ravel(), rcond=None)
    return np.array([(a, -b, c), (b, a, d)])


def crop_box(image: Image.Image, box: tuple[float, float, float, float], side: int) -> np.ndarray:
    """uint8 [side, side, 3]: a face's box, cut at the image's edge and resized without regard to its aspect."""
    left, top, width, height = box
    corners = (max(0, int(left)), max(0, int(top)), min(image.width, int(left + width)),
               min(image.height, int(top + height)))
    corners = (*corners[:2], max(corners[2], corners[0] + 1), max(corners[3], corners[1] + 1))
    return np.asarray(image.convert("RGB").crop(corners).resize((side, side), Image.Resampling.BILINEAR))
