"""Colours of a set of images, prompt by prompt: their shift with intervals, and their distributions.

The quantities are those of `metrics.ColourStatistics`. Hue is an angle, and its mean has a direction only as far as the
hues agree, which the resultant length measures (1: one hue, 0: hues cancel out). Near 0, an invisible change can rotate
the mean hue by any angle; resampling the prompts then rotates it as well, so the interval is wide.
"""

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from hgdpo_core.errors import InputError
from hgdpo_core.metrics import GREY_RESULTANT, ColourShift, ColourStatistics, rgb_to_hsv
from hgdpo_core.statistics.clusters import Crossed
from hgdpo_core.statistics.intervals import Estimate, Interval, percentile_interval, resample_sums

HUE_BINS, LEVEL_BINS = 36, 32
WEAK_RESULTANT = 0.1  # ours: below it `hue_degrees` is marked in reports
PIXELS, HUE, SATURATION, VALUE, COSINE, SINE = range(6)  # the fields of ColourStatistics


@dataclass
class ColourHistograms:
    """Distributions over all pixels of hue weighted by saturation (grey has no hue), of saturation and of value.

    `hue` has 36 bins around the circle, from red; the others 32 bins from 0 to 1.
    """

    hue: np.ndarray = field(default_factory=lambda: np.zeros(HUE_BINS))
    saturation: np.ndarray = field(default_factory=lambda: np.zeros(LEVEL_BINS))
    value: np.ndarray = field(default_factory=lambda: np.zeros(LEVEL_BINS))

    def update(self, hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> None:
        """Add an image's channels, each [H, W] in 0..1."""
        self.hue += _histogram(hue, HUE_BINS, weights=saturation.ravel())
        self.saturation += _histogram(saturation, LEVEL_BINS)
        self.value += _histogram(value, LEVEL_BINS)

    def as_dict(self) -> dict[str, list[float]]:
        """Fractions by channel, which sum to 1, rounded for JSON; all 0 for images without colour."""
        return {name: (counts / (counts.sum() or 1)).round(6).tolist() for name, counts in vars(self).items()}


@dataclass(frozen=True)
class ColourChange:
    """Tuned against target. Percentages are signed (the paper's Table 2 has absolute values)."""

    hue_degrees: Estimate
    hue_percent: Estimate
    saturation_percent: Estimate
    value_percent: Estimate
    target_hue_resultant: float | None
    """Mean resultant length of the saturation-weighted hue, 0..1; None for images without colour."""
    tuned_hue_resultant: float | None

    @property
    def hue_is_weak(self) -> bool:
        """Whether a mean hue has hardly a direction, so that its shift in degrees means little without its interval."""
        lengths = (self.target_hue_resultant, self.tuned_hue_resultant)
        return any(length is None or length < WEAK_RESULTANT for length in lengths)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values under the field names."""
        return asdict(self)


@dataclass
class PromptColours:
    """Colour sums of each prompt's images, in the order of the prompts, and the histograms of all of them."""

    statistics: list[ColourStatistics]
    histograms: ColourHistograms

    @classmethod
    def of(cls, prompts: int) -> "PromptColours":
        return cls([ColourStatistics() for _ in range(prompts)], ColourHistograms())

    def add(self, position: int, image: np.ndarray) -> None:
        """Add one image, uint8 [H, W, 3], of the prompt at `position`."""
        channels = rgb_to_hsv(image)
        self.statistics[position].add(*channels)
        self.histograms.update(*channels)

    def total(self) -> ColourStatistics:
        """The sums over all prompts."""
        return _merged(self.statistics)


def colour_change(tuned: Sequence[ColourStatistics], target: Sequence[ColourStatistics],
                  clusters: Crossed | None = None) -> ColourChange:
    """The shift of the tuned model's colours with 95 % bootstrap intervals over prompts, both models in pairs.

    With `clusters` the intervals are over people and prompts.

    One `ColourStatistics` per prompt on each side, in the same order. Intervals are None for one prompt. The ends of
    the angle's interval are not wrapped and at most 180 degrees away. InputError when the sides differ in length or a
    prompt has no image.
    """
    without = sum(not one.pixels for one in (*tuned, *target))
    if len(tuned) != len(target) or without:
        raise InputError(f"colour_change needs images of the same prompts by both models, got {len(tuned)} and "
                         f"{len(target)} prompts, of which {without} have none")
    sides = [np.array([astuple(one) for one in side], dtype=np.float64) for side in (tuned, target)]
    sums = np.concatenate(sides, axis=1)
    draws = resample_sums(sums) if clusters is None and len(tuned) > 1 else None
    whole = [_merged(side) for side in (tuned, target)]
    shift = whole[0].shift_from(whole[1])
    change = ColourChange(
        _degrees(shift, draws),
        *(_percent(whole[0], whole[1], draws, channel) for channel in (HUE, SATURATION, VALUE)),
        target_hue_resultant=hue_resultant(whole[1]), tuned_hue_resultant=hue_resultant(whole[0]))
    return change if clusters is None else _clustered(change, sums, clusters)


def _clustered(change: ColourChange, sums: np.ndarray, clusters: Crossed) -> ColourChange:
    """The change with intervals over people and prompts; `sums` [P, 12] of both models."""
    degrees = change.hue_degrees.value
    percents = {name: clusters.estimate(getattr(change, name).value, partial(_signed_percent, channel=channel), sums)
                for name, channel in (("hue_percent", HUE), ("saturation_percent", SATURATION),
                                      ("value_percent", VALUE))}
    hue = clusters.estimate(degrees, lambda total: _turned(total, degrees or 0.0), sums)
    if degrees is not None and hue.ci_low is not None and hue.ci_high is not None:
        hue = Estimate(degrees, max(hue.ci_low, degrees - 180), min(hue.ci_high, degrees + 180))
    return replace(change, hue_degrees=hue, **percents)


def hue_resultant(statistics: ColourStatistics) -> float | None:
    """Mean resultant length of the hue, weighted by saturation: 1 when all colour has one hue, near 0 when hues
    cancel out; None for images without colour."""
    length = float(np.hypot(statistics.cosine_sum, statistics.sine_sum))
    grey = statistics.saturation_sum < GREY_RESULTANT * statistics.pixels
    return None if grey else length / statistics.saturation_sum


def _degrees(shift: ColourShift, draws: np.ndarray | None) -> Estimate:
    if shift.hue_degrees is None or draws is None:
        return Estimate.of(shift.hue_degrees, None)
    tuned, target = draws[:, :6], draws[:, 6:]
    around = _turned(draws, shift.hue_degrees)
    grey = [np.hypot(side[:, COSINE], side[:, SINE]) < GREY_RESULTANT * side[:, PIXELS] for side in (tuned, target)]
    around[grey[0] != grey[1]] = np.nan
    around[grey[0] & grey[1]] = -shift.hue_degrees  # no hue on either side is no shift
    interval = percentile_interval(around, unknown=(-180.0, 180.0))
    if interval is None:
        return Estimate.of(shift.hue_degrees, None)
    # A mean hue without a direction may rotate mostly one way: the estimate itself stays inside.
    low, high = min(interval.low, 0.0), max(interval.high, 0.0)
    return Estimate.of(shift.hue_degrees, Interval(shift.hue_degrees + low, shift.hue_degrees + high))


def _turned(sums: np.ndarray, degrees: float) -> np.ndarray:
    """By how many degrees the mean hues of sums [R, 12] are further apart than `degrees`, from -180 to 180."""
    tuned, target = sums[:, :6], sums[:, 6:]
    angles = np.degrees(np.arctan2(tuned[:, SINE], tuned[:, COSINE]) - np.arctan2(target[:, SINE], target[:, COSINE]))
    return 180 - (180 - (angles - degrees)) % 360


def _percent(tuned: ColourStatistics, target: ColourStatistics, draws: np.ndarray | None, channel: int) -> Estimate:
    both = np.array([astuple(tuned) + astuple(target)], dtype=np.float64)
    value = float(_signed_percent(both, channel)[0])
    if np.isnan(value):
        return Estimate(None, None, None)
    return Estimate.of(value, None if draws is None else percentile_interval(_signed_percent(draws, channel)))


def _signed_percent(sums: np.ndarray, channel: int) -> np.ndarray:
    """100 * (m - m0) / m0 for sums [R, 12]; 0 where both means are 0, NaN where only the target's is."""
    mean, reference = sums[:, channel] / sums[:, PIXELS], sums[:, 6 + channel] / sums[:, 6 + PIXELS]
    return np.divide(100 * (mean - reference), reference, where=reference > 0,
                     out=np.where(mean == reference, 0.0, np.nan))


def _merged(statistics: Sequence[ColourStatistics]) -> ColourStatistics:
    whole = ColourStatistics()
    for one in statistics:
        whole.merge(one)
    return whole


def _histogram(channel: np.ndarray, bins: int, weights: np.ndarray | None = None) -> np.ndarray:
    index = np.minimum((channel.ravel() * bins).astype(np.int64), bins - 1)
    return np.bincount(index, weights=weights, minlength=bins)
