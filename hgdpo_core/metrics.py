"""What the evaluation measures (arXiv:2405.20216v1): win rate, colour shift, latent distance.

Pure: arrays in, numbers out. A number that is not defined, such as the win rate of ties alone, is None, which
JSON writes as null.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from scipy.stats import binomtest

from hgdpo_core.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

Scores = torch.Tensor | np.ndarray | Sequence[float]
Images = torch.Tensor | np.ndarray | Sequence["Image.Image"]

CONFIDENCE = 0.95
GREY_RESULTANT = 1e-9  # below this mean saturation vector, rounding alone decides the hue


@dataclass(frozen=True)
class WinRate:
    """How often A scores above B. Rates are in 0..1 and None when there is no win and no loss."""

    rate: float | None
    wins: int
    losses: int
    ties: int
    n: int
    ci_low: float | None
    ci_high: float | None

    @classmethod
    def from_counts(cls, wins: int, losses: int, ties: int) -> Self:
        """Rate wins / (wins + losses) with its Clopper-Pearson 95 % interval; ties only count in `n`."""
        if min(wins, losses, ties) < 0:
            raise InputError("wins, losses and ties count prompts and cannot be negative, "
                             f"got {(wins, losses, ties)}")
        decided, n = wins + losses, wins + losses + ties
        if decided == 0:
            return cls(None, wins, losses, ties, n, None, None)
        interval = binomtest(wins, decided).proportion_ci(CONFIDENCE, method="exact")
        return cls(wins / decided, wins, losses, ties, n, float(interval.low), float(interval.high))

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain JSON values under the field names, as `summary.json` holds them."""
        return asdict(self)


def win_rate(scores_a: Scores, scores_b: Scores) -> WinRate:
    """Fraction of prompts on which A scores above B, without ties.

    Scores are finite [P] (one image per prompt) or [P, K] (K images per prompt, averaged before the comparison);
    row i of both is the same prompt with the same seeds. A tie is exact equality. InputError (a ValueError)
    names shapes that differ and how many scores are not finite.
    """
    # the float64 mean of float32 scores is exact enough to keep equal scores equal
    a, b = (side.mean(axis=1) for side in paired_scores("win_rate", scores_a, scores_b))
    return WinRate.from_counts(int((a > b).sum()), int((a < b).sum()), int((a == b).sum()))


def paired_scores(function: str, scores_a: Scores, scores_b: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Both sides as float64 [P, K]; InputError, in the name of `function`, unless they are pairs of finite scores."""
    a, b = _float64(scores_a), _float64(scores_b)
    if a.shape != b.shape or a.ndim not in (1, 2) or (a.ndim == 2 and a.shape[1] == 0):
        raise InputError(f"{function} needs two score arrays of one shape, [P] or [P, K] with K >= 1, "
                         f"got {list(a.shape)} and {list(b.shape)}: score the same prompts with both models")
    broken_a, broken_b = int((~np.isfinite(a)).sum()), int((~np.isfinite(b)).sum())
    if broken_a or broken_b:
        raise InputError(f"{function} needs finite scores, but {broken_a} of {a.size} scores of A and "
                         f"{broken_b} of {b.size} of B are not: score these again or leave out their prompts")
    return (a[:, None], b[:, None]) if a.ndim == 1 else (a, b)


class ColourShift(NamedTuple):
    """Colours that moved: `hue`, `saturation`, `value` in percent, unsigned; `hue_degrees` in (-180, 180]."""

    hue: float | None
    saturation: float | None
    value: float | None
    hue_degrees: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Plain JSON values under the field names."""
        return self._asdict()


@dataclass
class ColourStatistics:
    """Sums over the HSV pixels of any number of images, so that the images need not be in memory.

    Hue, saturation and value are in 0..1. The fields are plain numbers: `dataclasses.asdict` carries the
    statistics of a shard through JSON, and `merge` puts shards together.
    """

    pixels: int = 0
    hue_sum: float = 0.0
    saturation_sum: float = 0.0
    value_sum: float = 0.0
    cosine_sum: float = 0.0  # of saturation * cos(2 pi hue)
    sine_sum: float = 0.0  # of saturation * sin(2 pi hue)

    def update(self, images: Images) -> None:
        """Add images: uint8 [B, H, W, 3] (numpy or torch) or a sequence of PIL images of any sizes."""
        for image in _each_uint8_image(images):
            self.add(*rgb_to_hsv(image))

    def add(self, hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> None:
        """Add one image as `rgb_to_hsv` returns it."""
        angle = 2 * np.pi * hue
        self.pixels += hue.size
        self.hue_sum += float(hue.sum())
        self.saturation_sum += float(saturation.sum())
        self.value_sum += float(value.sum())
        self.cosine_sum += float((saturation * np.cos(angle)).sum())
        self.sine_sum += float((saturation * np.sin(angle)).sum())

    def merge(self, other: "ColourStatistics") -> None:
        """Add the images that `other` has seen."""
        for name, amount in asdict(other).items():
            setattr(self, name, getattr(self, name) + amount)

    def shift_from(self, reference: "ColourStatistics") -> ColourShift:
        """Colour shift of these images against `reference`, as `colour_shift` describes it."""
        if not self.pixels or not reference.pixels:
            raise InputError("colour shift needs at least one image on both sides, "
                             f"got {self.pixels} and {reference.pixels} pixels")
        hue, saturation, value = (
            _percent_change(getattr(self, name) / self.pixels, getattr(reference, name) / reference.pixels)
            for name in ("hue_sum", "saturation_sum", "value_sum"))
        return ColourShift(hue, saturation, value, _hue_difference(self._hue_degrees(), reference._hue_degrees()))

    def _hue_degrees(self) -> float | None:
        """Saturation-weighted circular mean of the hue; None for images without colour."""
        if math.hypot(self.cosine_sum, self.sine_sum) < GREY_RESULTANT * self.pixels:
            return None
        return math.degrees(math.atan2(self.sine_sum, self.cosine_sum))


def colour_shift(images: Images, reference_images: Images) -> ColourShift:
    """Colour shift of `images` against those of the target model (paper Table 2).

    `hue`, `saturation`, `value` are 100 * |m - m0| / m0 of plain channel means over all pixels, the paper's
    reading; None where the reference's mean is 0 and the other is not. Hue is an angle, though, so
    `hue_degrees` is the signed, wrapped difference of the saturation-weighted circular means: positive from
    red towards yellow, 0 when neither side has a hue, None when just one has none.

    Images are uint8 [B, H, W, 3] (numpy or torch) or a sequence of PIL images; the two sides may differ in
    number and size. For sets that do not fit in memory, feed a `ColourStatistics` for each side.
    """
    statistics, reference = ColourStatistics(), ColourStatistics()
    statistics.update(images)
    reference.update(reference_images)
    return statistics.shift_from(reference)


def rgb_to_hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue, saturation and value, each float64 [H, W] in 0..1, of uint8 [H, W, 3]; as Python's `colorsys`."""
    red, green, blue = (image[..., channel].astype(np.float64) / 255 for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    safe_chroma = np.where(chroma > 0, chroma, 1.0)
    saturation = chroma / np.where(value > 0, value, 1.0)
    not_red = np.where(value == green, 2 + (blue - red) / safe_chroma, 4 + (red - green) / safe_chroma)
    sextant = np.where(value == red, (green - blue) / safe_chroma, not_red)
    hue = np.where(chroma > 0, sextant / 6 % 1.0, 0.0)
    return hue, saturation, value


def latent_distance(latents: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine distance of channel means and of channel standard deviations, float32 [B] each (Figure 5b).

    `latents` and `other` are [B, C, H, W], row i of both from one pool: its best and its n-th best image. The
    distance is 1 - cosine over channels, in 0..2. InputError when the shapes are not alike.
    """
    if latents.ndim != 4 or latents.shape != other.shape:
        raise InputError("latent_distance needs two latents of one shape [B, C, H, W], "
                         f"got {list(latents.shape)} and {list(other.shape)}")
    a, b = latents.float(), other.float()
    means = torch.cosine_similarity(a.mean(dim=(2, 3)), b.mean(dim=(2, 3)))
    deviations = torch.cosine_similarity(a.std(dim=(2, 3)), b.std(dim=(2, 3)))
    return 1 - means, 1 - deviations


def mean_pairwise_distance(features: torch.Tensor) -> torch.Tensor:
    """Diversity: mean of 1 - cosine over all pairs of a prompt's K images, float32 [P], in 0..2 (Figure 8).

    `features` are [P, K, D] of any length, K >= 2; 0 means that all images of a prompt look alike to the features.
    """
    if features.ndim != 3 or features.shape[1] < 2:
        raise InputError("mean_pairwise_distance needs features [P, K, D] of at least 2 images per prompt, got "
                         f"{list(features.shape)}")
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    first, second = torch.triu_indices(features.shape[1], features.shape[1], offset=1)
    return 1 - (unit[:, first] * unit[:, second]).sum(dim=-1).mean(dim=-1)


def channel_means(image: np.ndarray) -> np.ndarray:
    """What colour tables need of one image uint8 [H, W, 3]: float64 [8] of plain means over its pixels.

    Hue, saturation, value (0..1), saturation * cos and * sin of the hue (its circular mean), red, green, blue (0..255).
    """
    hue, saturation, value = rgb_to_hsv(image)
    angle = 2 * np.pi * hue
    channels = (hue, saturation, value, saturation * np.cos(angle), saturation * np.sin(angle))
    return np.array([*(channel.mean() for channel in channels), *image.reshape(-1, 3).mean(axis=0)])


def _float64(scores: Scores) -> np.ndarray:
    if isinstance(scores, torch.Tensor):
        return scores.detach().to("cpu", torch.float64).numpy()
    return np.asarray(scores, dtype=np.float64)


def _each_uint8_image(images: Images) -> Iterator[np.ndarray]:
    """The images as views of uint8 [H, W, 3]; PIL images are converted to RGB."""
    if isinstance(images, torch.Tensor | np.ndarray):
        array: Any = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else images
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
            raise InputError(f"images must be uint8 [B, H, W, 3], got {array.dtype} {list(array.shape)}")
        yield from array
    else:
        for image in images:
            yield np.asarray(image.convert("RGB"))


def _percent_change(mean: float, reference_mean: float) -> float | None:
    if mean == reference_mean:
        return 0.0
    return 100 * abs(mean - reference_mean) / reference_mean if reference_mean else None


def _hue_difference(degrees: float | None, reference_degrees: float | None) -> float | None:
    if degrees is None or reference_degrees is None:
        return 0.0 if degrees is reference_degrees else None
    return 180 - (180 - (degrees - reference_degrees)) % 360
