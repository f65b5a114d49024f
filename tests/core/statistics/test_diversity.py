"""The spread of thumbnails: by hand, in pairs, and independent of what is not variety."""

import numpy as np
import pytest

from hgdpo_core.errors import InputError
from hgdpo_core.statistics.diversity import thumbnail, variety_change

RNG = np.random.default_rng(0)


def test_a_thumbnail_is_area_means():
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    image[:2, :2, 0] = (0, 100), (200, 100)
    small = thumbnail(image).reshape(8, 8, 3)
    assert small[0, 0, 0] == pytest.approx(100 / 255) and small.sum() == pytest.approx(100 / 255)
    assert thumbnail(RNG.integers(0, 256, (40, 28, 3), dtype=np.uint8)).shape == (192,)


def test_the_spread_over_all_prompts_by_hand():
    target = np.array([[[0.0, 0.0]], [[2.0, 0.0]]])  # one image per prompt: each 1 from the mean
    tuned = np.array([[[0.0, 0.0]], [[0.0, 1.0]]])  # each 1/2 from the mean
    change = variety_change(tuned, target)
    assert change.value == pytest.approx(-50)


def test_the_spread_inside_a_prompt_by_hand():
    target = np.array([[[0.0], [2.0]], [[10.0], [12.0]]])  # each 1 from its prompt's mean
    tuned = np.array([[[5.0], [5.0]], [[10.0], [12.0]]])  # one prompt alike: root of 1/2
    change = variety_change(tuned, target)
    assert change.value == pytest.approx(100 * (np.sqrt(0.5) - 1))
    # Resampled: both prompts alike, neither, or one: the ends are known.
    assert (change.ci_low, change.ci_high) == pytest.approx((-100, 0))


@pytest.mark.parametrize("images", [1, 3])
def test_a_tenth_less_is_seen_and_a_shift_is_not(images):
    target = RNG.random((60, images, 12))
    shrunk = target.mean(axis=(0, 1)) + 0.9 * (target - target.mean(axis=(0, 1)))
    change = variety_change(shrunk, target)
    assert change.value == pytest.approx(-10)
    assert (change.ci_low, change.ci_high) == pytest.approx((-10, -10))  # paired, so without width
    moved = variety_change(target + 0.3, target)
    assert (moved.value, moved.ci_low, moved.ci_high) == pytest.approx((0, 0, 0), abs=1e-6)


def test_undefined_changes_are_none():
    alike, other = np.ones((4, 1, 3)), RNG.random((4, 1, 3))
    assert variety_change(other, alike).value is None
    assert variety_change(alike, other).value == pytest.approx(-100)
    single = variety_change(RNG.random((1, 2, 3)), RNG.random((1, 2, 3)))
    assert single.value is not None and single.ci_low is None
    with pytest.raises(InputError, match=r"\[4, 1, 3\] and \[4, 2, 3\]"):
        variety_change(alike, np.ones((4, 2, 3)))
