"""Colour changes with their intervals: nothing where nothing moved, wide where the mean hue has no direction."""

import json

import numpy as np
import pytest

from hgdpo_core.errors import InputError
from hgdpo_core.metrics import ColourStatistics, colour_shift, rgb_to_hsv
from hgdpo_core.statistics.colours import (
    HUE_BINS,
    LEVEL_BINS,
    ColourHistograms,
    PromptColours,
    colour_change,
    hue_resultant,
)

RNG = np.random.default_rng(0)
RED, YELLOW, GREEN, CYAN, BLUE = (255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255)
GREY = (90, 90, 90)


def solid(*rgb: int) -> np.ndarray:
    return np.full((2, 2, 3), rgb, dtype=np.uint8)


def statistics(*images: np.ndarray) -> list[ColourStatistics]:
    """One image per prompt."""
    colours = PromptColours.of(len(images))
    for position, image in enumerate(images):
        colours.add(position, image)
    return colours.statistics


def noisy(rgb: tuple[int, int, int], seed: int, prompts: int = 40) -> list[np.ndarray]:
    """Images whose pixels scatter around a colour, and whose prompts differ too."""
    rng = np.random.default_rng(seed)
    centres = np.array(rgb) + rng.normal(0, 25, (prompts, 1, 1, 3))
    return list(np.clip(centres + rng.normal(0, 10, (prompts, 4, 4, 3)), 0, 255).astype(np.uint8))


def test_values_are_those_of_colour_shift_with_their_sign():
    tuned, target = noisy((160, 90, 90), 1), noisy((200, 120, 90), 2)
    shift, change = colour_shift(np.stack(tuned), np.stack(target)), colour_change(
        statistics(*tuned), statistics(*target))
    assert change.hue_degrees.value == pytest.approx(shift.hue_degrees)
    for estimate, size in ((change.hue_percent, shift.hue), (change.saturation_percent, shift.saturation),
                           (change.value_percent, shift.value)):
        assert abs(estimate.value) == pytest.approx(size)
        assert estimate.ci_low < estimate.value < estimate.ci_high
    assert change.value_percent.value < 0 and change.value_percent.ci_high < 0  # darker, by the whole interval


def test_equal_images_have_no_shift_and_no_width():
    images = statistics(*noisy((120, 140, 90), 3))
    change = colour_change(images, images)
    for estimate in (change.hue_degrees, change.hue_percent, change.saturation_percent, change.value_percent):
        assert (estimate.value, estimate.ci_low, estimate.ci_high) == pytest.approx((0, 0, 0), abs=1e-9)


def test_a_small_rotation_of_one_clear_hue_has_a_narrow_interval():
    change = colour_change(statistics(*[solid(255, 17, 0)] * 20), statistics(*[solid(255, 0, 0)] * 20))
    assert change.hue_degrees.value == pytest.approx(4)
    assert (change.hue_degrees.ci_low, change.hue_degrees.ci_high) == pytest.approx((4, 4))
    assert change.target_hue_resultant == pytest.approx(1) and not change.hue_is_weak


def test_hues_that_cancel_out_make_a_wide_interval():
    """All hues alike: one prompt's brightness decides where the mean points, and the interval says so."""
    wheel = [RED, YELLOW, GREEN, CYAN, BLUE, (255, 0, 255)]
    target = [solid(*rgb) for rgb in wheel * 10]
    tuned = [*target[:-1], solid(255, 255, 0)]
    change = colour_change(statistics(*tuned), statistics(*target))
    assert change.target_hue_resultant == pytest.approx(0, abs=1e-9) and change.hue_is_weak
    tuned[0] = solid(0, 255, 0)  # now neither mean is exactly nothing
    target[0] = solid(255, 255, 0)
    change = colour_change(statistics(*tuned), statistics(*target))
    assert change.hue_is_weak
    assert change.hue_degrees.ci_high - change.hue_degrees.ci_low > 90
    low, value, high = change.hue_degrees.ci_low, change.hue_degrees.value, change.hue_degrees.ci_high
    assert value - 180 <= low <= value <= high <= value + 180


def test_the_interval_does_not_break_at_half_a_turn():
    rng = np.random.default_rng(4)
    opposite = [solid(int(g), 255, int(255 - g)) for g in rng.integers(0, 60, 30)]  # near 160 degrees from red
    change = colour_change(statistics(*opposite), statistics(*[solid(*RED)] * 30))
    assert change.hue_degrees.ci_high - change.hue_degrees.ci_low < 20


def test_colour_in_few_prompts_leaves_the_hue_open():
    """One coloured prompt of ten: without it (35 % of the resamples) there is no hue at all."""
    tuned, target = [solid(*GREEN), *[solid(*GREY)] * 9], [solid(*RED)] * 10
    change = colour_change(statistics(*tuned), statistics(*target))
    assert change.hue_degrees.value == pytest.approx(120)
    assert (change.hue_degrees.ci_low, change.hue_degrees.ci_high) == pytest.approx((-60, 300))


def test_what_is_undefined_is_none():
    grey, black, red = (statistics(*[solid(*rgb)] * 3) for rgb in (GREY, (0, 0, 0), RED))
    change = colour_change(red, grey)
    assert change.hue_degrees.value is None and change.hue_degrees.ci_low is None
    assert change.target_hue_resultant is None and change.tuned_hue_resultant == pytest.approx(1)
    assert change.hue_is_weak
    assert colour_change(red, black).value_percent.value is None
    same = colour_change(grey, grey).hue_degrees
    assert (same.value, same.ci_low, same.ci_high) == (0, 0, 0)
    one = colour_change(red[:1], red[:1])
    assert one.hue_degrees.value == 0 and one.hue_degrees.ci_low is None and one.value_percent.ci_high is None
    json.dumps(change.as_dict(), allow_nan=False)


def test_sides_must_be_the_same_prompts():
    with pytest.raises(InputError, match="got 2 and 1 prompts"):
        colour_change(statistics(solid(*RED), solid(*RED)), statistics(solid(*RED)))
    with pytest.raises(InputError, match="of which 1 have none"):
        colour_change(statistics(solid(*RED)), [ColourStatistics()])


def test_resultant_worked_by_hand():
    # Red at saturation 1 against cyan at saturation 1/2: (1 - 1/2) / (1 + 1/2).
    image = np.concatenate([solid(255, 0, 0), solid(127, 254, 254)])
    one = ColourStatistics()
    one.add(*rgb_to_hsv(image))
    assert hue_resultant(one) == pytest.approx((1 - 127 / 254) / (1 + 127 / 254))
    assert hue_resultant(statistics(solid(*GREY))[0]) is None


def test_histograms_are_shares_and_grey_has_no_hue():
    histograms = ColourHistograms()
    for rgb in (RED, GREEN, GREY, GREY):
        histograms.update(*rgb_to_hsv(solid(*rgb)))
    shares = histograms.as_dict()
    assert [len(shares[name]) for name in ("hue", "saturation", "value")] == [HUE_BINS, LEVEL_BINS, LEVEL_BINS]
    assert shares["hue"][0] == shares["hue"][HUE_BINS // 3] == 0.5 and sum(shares["hue"]) == 1
    assert shares["saturation"][0] == shares["saturation"][-1] == 0.5
    assert shares["value"][-1] == 0.5 and shares["value"][int(90 / 255 * LEVEL_BINS)] == 0.5
    assert sum(ColourHistograms().as_dict()["hue"]) == 0


def test_colours_of_several_images_go_to_their_prompt():
    colours, images = PromptColours.of(2), RNG.integers(0, 256, (4, 3, 3, 3), dtype=np.uint8)
    for position, image in zip((0, 1, 0, 1), images, strict=True):
        colours.add(position, image)
    first, whole = ColourStatistics(), ColourStatistics()
    first.update(images[[0, 2]])
    whole.update(images)
    assert colours.statistics[0] == first
    assert colours.total().value_sum == pytest.approx(whole.value_sum)
