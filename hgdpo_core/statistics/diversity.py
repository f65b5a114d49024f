"""How much a model's images differ from each other, measured by small thumbnails. Pure functions, no network.

Preference tuning can win by making all images alike. Feature distances of a prompt's images measure this best, but need
several images per prompt and a network; thumbnails cost nothing and show a coarse loss of variety.
"""

from typing import Any

import numpy as np
from PIL import Image

from hgdpo_core.errors import InputError
from hgdpo_core.statistics.clusters import Crossed
from hgdpo_core.statistics.intervals import Estimate, percentile_interval, resample_sums

SIDE_PX = 8  # composition and palette, no detail
DIMENSIONS = 3 * SIDE_PX**2


def thumbnail(image: np.ndarray) -> np.ndarray:
    """float32 [192] in 0..1: the area means of an image uint8 [H, W, 3] on an 8 x 8 grid."""
    small: Any = Image.fromarray(image).resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(-1) / 255


def variety_change(tuned: np.ndarray, target: np.ndarray, clusters: Crossed | None = None) -> Estimate:
    """Percent by which the tuned model's thumbnails [P, K, D] spread more than the target's, with a 95 % interval.

    The spread is the root mean square distance from the prompt's mean image if there are several images per prompt
    (K >= 2), and from the mean of all images if there is one. Prompts are resampled, both models in pairs; with
    `clusters` the interval is over people and prompts. None if the target's images do not differ at all; InputError for
    shapes that do not match.
    """
    if tuned.ndim != 3 or tuned.shape != target.shape or not tuned.size:
        raise InputError(f"variety_change needs thumbnails [P, K, D] of the same prompts by both models, got "
                         f"{list(tuned.shape)} and {list(target.shape)}")
    sums = np.concatenate([_sums(side.astype(np.float64)) for side in (tuned, target)], axis=1)
    value = float(_change(sums.sum(axis=0)[None], len(sums))[0])
    if np.isnan(value):
        return Estimate(None, None, None)
    if clusters is not None:
        return clusters.estimate(value, lambda total: _change(total, len(sums)), sums)
    draws = _change(resample_sums(sums), len(sums)) if len(sums) > 1 else None
    return Estimate.of(value, None if draws is None else percentile_interval(draws))


def _sums(side: np.ndarray) -> np.ndarray:
    """The contribution of each prompt to the spread [P, S]: its inner spread, or for one image the variance's sums."""
    if side.shape[1] > 1:
        return side.var(axis=1).sum(axis=1, keepdims=True)
    images = side[:, 0]
    return np.concatenate([np.square(images).sum(axis=1, keepdims=True), images], axis=1)


def _change(sums: np.ndarray, prompts: int) -> np.ndarray:
    """Percent [R] of sums [R, 2 S] over prompts; nan if the target's images are all alike."""
    tuned, target = (np.sqrt(np.maximum(means[:, 0] - np.square(means[:, 1:]).sum(axis=1), 0.0))
                     for means in np.split(sums / prompts, 2, axis=1))
    return np.divide(100 * (tuned - target), target, out=np.full(len(sums), np.nan), where=target > 1e-6)
