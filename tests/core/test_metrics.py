"""Metrics against numbers worked by hand, colorsys and scipy's beta distribution."""

import colorsys
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import beta

from hgdpo_core.errors import HGDPOError, InputError
from hgdpo_core.metrics import (
    ColourStatistics,
    WinRate,
    channel_means,
    colour_shift,
    latent_distance,
    mean_pairwise_distance,
    rgb_to_hsv,
    win_rate,
)

RNG = np.random.default_rng(0)


def solid(*rgb: int, size: int = 4) -> np.ndarray:
    return np.full((1, size, size, 3), rgb, dtype=np.uint8)


# --- win rate


def test_all_wins_leave_only_the_lower_end_open():
    rate = win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0])
    assert (rate.rate, rate.wins, rate.losses, rate.ties, rate.n) == (1.0, 4, 0, 0, 4)
    # By hand: P(4 of 4 | p) = p^4 = 0.025.
    assert rate.ci_low == pytest.approx(0.025**0.25)
    assert rate.ci_high == 1.0


def test_one_prompt_shows_almost_nothing():
    rate = win_rate(torch.tensor([1.0]), torch.tensor([2.0]))
    assert rate.rate == 0.0
    assert (rate.ci_low, rate.ci_high) == (0.0, pytest.approx(0.975))  # 1 - p = 0.025


def test_ties_are_counted_apart():
    rate = win_rate(np.array([1.0, 2, 3, 4, 5]), np.array([1.0, 1, 1, 5, 5]))
    assert (rate.wins, rate.losses, rate.ties, rate.n) == (2, 1, 2, 5)
    assert rate.rate == pytest.approx(2 / 3)
    assert rate == WinRate.from_counts(2, 1, 2)


def test_all_ties_have_no_rate_and_are_json_null():
    rate = win_rate(torch.ones(3), torch.ones(3))
    assert rate == WinRate(None, 0, 0, 3, 3, None, None)
    assert json.loads(json.dumps(rate.as_dict())) == {
        "rate": None, "wins": 0, "losses": 0, "ties": 3, "n": 3, "ci_low": None, "ci_high": None}
    assert win_rate([], []).n == 0


def test_interval_is_clopper_pearson():
    # scipy's beta quantiles, the textbook form of the exact interval, for a rate of the paper's size.
    rate = WinRate.from_counts(110, 60, 7)
    assert rate.n == 177
    assert rate.ci_low == pytest.approx(beta.ppf(0.025, 110, 61), rel=1e-9)
    assert rate.ci_high == pytest.approx(beta.ppf(0.975, 111, 60), rel=1e-9)


def test_several_images_are_averaged_before_the_comparison():
    a = torch.tensor([[0.0, 10.0], [1.0, 1.0]])  # means 5 and 1
    b = torch.tensor([[4.0, 4.0], [1.5, 0.5]])  # means 4 and 1
    rate = win_rate(a, b)
    assert (rate.wins, rate.losses, rate.ties, rate.n) == (1, 0, 1, 2)


def test_averaging_in_another_order_keeps_a_tie():
    scores = torch.tensor(RNG.normal(21, 1, (50, 7)), dtype=torch.float32)
    assert win_rate(scores, scores.flip(1)).ties == 50


def test_swapping_the_models_swaps_wins_and_losses():
    a, b = RNG.normal(size=200), RNG.normal(size=200)
    there, back = win_rate(a, b), win_rate(b, a)
    assert (there.wins, there.losses) == (back.losses, back.wins)
    assert there.ci_low is not None and back.ci_high is not None
    assert there.ci_low == pytest.approx(1 - back.ci_high)


def test_scores_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="2 of 3 scores of A and 1 of 3"):
        win_rate([math.nan, math.inf, 1.0], [0.0, -math.inf, 1.0])
    for a, b in (((3,), (4,)), ((2, 2), (2,)), ((2, 0), (2, 0))):
        with pytest.raises(HGDPOError, match="one shape"):
            win_rate(np.zeros(a), np.zeros(b))
    with pytest.raises(InputError, match="negative"):
        WinRate.from_counts(1, -1, 0)


# --- colour


def test_hsv_is_colorsys():
    pixels = np.concatenate([
        RNG.integers(0, 256, (500, 3)),
        [(0, 0, 0), (255, 255, 255), (7, 7, 7), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)],
        [(255, 0, 1), (255, 0, 255), (0, 255, 255), (1, 0, 0)],
    ]).astype(np.uint8)
    hsv = np.stack(rgb_to_hsv(pixels[None]), axis=-1)[0]
    expected = np.array([colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in pixels])
    np.testing.assert_allclose(hsv, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("images", [
    RNG.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8), solid(128, 128, 128), solid(0, 0, 0)])
def test_identical_images_do_not_shift(images):
    assert colour_shift(images, images) == (0.0, 0.0, 0.0, 0.0)


def test_percentages_worked_by_hand():
    # (200, 100, 100): hue 0, s 1/2, v 200/255. (100, 100, 50): yellow, hue 1/6, s 1/2, v 100/255.
    reference = np.concatenate([solid(200, 100, 100), solid(100, 100, 50)])
    # The reference's means: hue 1/12, s 1/2, v 150/255. The image's: hue 1/6, s 3/4, v 100/255.
    images = solid(100, 100, 25)
    hue, saturation, value, hue_degrees = colour_shift(images, reference)
    assert hue == pytest.approx(100)
    assert saturation == pytest.approx(50)
    assert value == pytest.approx(100 / 3)
    assert hue_degrees == pytest.approx(30)  # from 30, between red and yellow, to 60


def test_hue_wraps_at_red():
    before, after = solid(255, 0, 17), solid(255, 17, 0)  # hues 356 and 4 degrees
    forward, backward = colour_shift(after, before), colour_shift(before, after)
    assert forward.hue_degrees == pytest.approx(8)
    assert backward.hue_degrees == pytest.approx(-8)
    assert forward.hue == pytest.approx(100 * 352 / 356)  # what a plain mean makes of 8 degrees
    assert colour_shift(solid(0, 255, 255), solid(255, 0, 0)).hue_degrees == pytest.approx(180)


def test_grey_pixels_do_not_affect_the_hue():
    coloured = np.concatenate([solid(0, 200, 0), solid(90, 90, 90)])
    assert colour_shift(coloured, solid(0, 200, 0)).hue_degrees == pytest.approx(0, abs=1e-9)


def test_undefined_shifts_are_none():
    assert colour_shift(solid(255, 0, 0), solid(0, 0, 0)) == (0.0, None, None, None)
    assert colour_shift(solid(80, 80, 80), solid(0, 0, 255)).hue_degrees is None


def test_all_forms_of_images_agree():
    images, reference = RNG.integers(0, 256, (2, 5, 6, 8, 3), dtype=np.uint8)
    expected = colour_shift(images, reference)
    assert colour_shift(torch.from_numpy(images), torch.from_numpy(reference)) == expected
    sides = [[Image.fromarray(pixels) for pixels in side] for side in (images, reference)]
    assert colour_shift(*sides) == expected
    assert list(expected.as_dict()) == ["hue", "saturation", "value", "hue_degrees"]


def test_shards_merge_through_json_to_the_whole():
    images = RNG.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    whole, merged = ColourStatistics(), ColourStatistics()
    whole.update(images)
    for shard in (images[:2], images[2:]):
        part = ColourStatistics()
        part.update(shard)
        merged.merge(ColourStatistics(**json.loads(json.dumps(dataclasses.asdict(part)))))
    assert merged.pixels == whole.pixels == 96
    assert dataclasses.astuple(merged) == pytest.approx(dataclasses.astuple(whole))
    assert whole.shift_from(merged) == pytest.approx((0, 0, 0, 0), abs=1e-9)


def test_unusable_images_are_refused():
    floats, single, channels_first = solid(0, 0, 0) / 255, solid(0, 0, 0)[0], torch.zeros(1, 3, 4, 4)
    for images in (floats, single, channels_first):
        with pytest.raises(ValueError, match=r"uint8 \[B, H, W, 3\]"):
            colour_shift(images, solid(0, 0, 0))
    with pytest.raises(InputError, match="at least one image"):
        colour_shift([], solid(0, 0, 0))


# --- latent distance


def test_latent_distance_worked_by_hand():
    ramp = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])
    best = torch.stack([1 + ramp, 0 * ramp])[None]  # means (1, 0), deviations along (1, 0)
    other = torch.stack([3 + ramp, 3 + 0 * ramp])[None]  # means (3, 3), deviations along (1, 0)
    means, deviations = latent_distance(best, other)
    assert means.item() == pytest.approx(1 - 1 / math.sqrt(2), abs=1e-6)
    assert deviations.item() == pytest.approx(0, abs=1e-6)
    same = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    for distance in latent_distance(same, same):
        assert distance.shape == (3,) and distance.dtype == torch.float32
        torch.testing.assert_close(distance, torch.zeros(3), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=r"\[B, C, H, W\]"):
        latent_distance(same, same[:1])


def test_diversity_is_the_mean_distance_of_all_pairs():
    features = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]], [[3.0, 3.0], [1.0, 1.0], [2.0, 2.0]]])
    torch.testing.assert_close(mean_pairwise_distance(features), torch.tensor([(1 + 2 + 1) / 3, 0.0]))
    with pytest.raises(InputError, match="at least 2 images per prompt"):
        mean_pairwise_distance(features[:, :1])


def test_channel_means_are_those_of_the_colour_shift():
    rng = np.random.default_rng(5)
    image, other = rng.integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
    ours, theirs = channel_means(image), channel_means(other)
    shift = colour_shift(image[None], other[None])
    for channel, name in enumerate(("hue", "saturation", "value")):
        assert getattr(shift, name) == pytest.approx(100 * abs(ours[channel] / theirs[channel] - 1))
    angle = np.degrees(np.arctan2(ours[4], ours[3]) - np.arctan2(theirs[4], theirs[3]))
    assert shift.hue_degrees == pytest.approx(180 - (180 - angle) % 360)
    np.testing.assert_allclose(ours[5:], image.reshape(-1, 3).mean(axis=0))
