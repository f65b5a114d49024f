"""Intervals over people and prompts: Student's where all samples are apart, wider where they share a person."""

import numpy as np
import pytest

from hgdpo_core.errors import InputError
from hgdpo_core.statistics.clusters import Crossed, influence_of
from hgdpo_core.statistics.colours import PromptColours, colour_change
from hgdpo_core.statistics.diversity import variety_change
from hgdpo_core.statistics.intervals import defect_change, score_change


def apart(samples):
    """Each sample with a person and a prompt of its own."""
    names = [str(number) for number in range(samples)]
    return Crossed.of(names, names)


def crossed(people, prompts):
    grid = np.indices((people, prompts)).reshape(2, -1)
    return Crossed.of(*(axis.astype(str) for axis in grid))


def widths(estimate):
    return estimate.ci_high - estimate.ci_low


def test_samples_apart_give_students_interval():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 30))
    plain, clustered = score_change(after, before), score_change(after, before, apart(30))
    assert (clustered.ci_low, clustered.ci_high) == pytest.approx((plain.ci_low, plain.ci_high))


def test_influence_is_the_derivative_by_a_samples_weight():
    samples = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])
    found = influence_of(lambda sums: sums[:, 0] / sums[:, 1], samples)
    assert found == pytest.approx((samples[:, 0] - samples[:, 1] * 9 / 15) / 15, abs=1e-6)


def test_samples_of_one_person_count_as_little_as_they_tell():
    """Eight prompts for each of 12 people, and only the person matters: as if there were 12 samples."""
    rng = np.random.default_rng(1)
    change = np.repeat(rng.normal(size=12), 8)
    clustered = score_change(change, np.zeros(96), crossed(12, 8))
    people = score_change(change[::8], np.zeros(12))
    assert clustered.mean == pytest.approx(people.mean) and clustered.mean_a == pytest.approx(clustered.mean)
    assert 1 <= widths(clustered) / widths(people) < 1.3
    assert widths(clustered) > 2 * widths(score_change(change, np.zeros(96)))
    assert score_change(change, np.zeros(96), crossed(1, 96)).ci_low is None
    with pytest.raises(InputError, match="a person and a prompt of each sample, got 2 and 1"):
        Crossed.of(["a", "b"], ["x"])


def images(shades, seed):
    """Plain images [8, 8, 3] of reddish shades, a little noisy."""
    rng = np.random.default_rng(seed)
    base = np.array([180, 90, 60])
    noise = rng.normal(0, 3, (len(shades), 8, 8, 3))
    return np.clip(base + shades[:, None, None, None] + noise, 0, 255).astype(np.uint8)


def colours_of(pixels):
    colours = PromptColours.of(len(pixels))
    for position, image in enumerate(pixels):
        colours.add(position, image)
    return colours.statistics


def test_colours_defects_and_variety_of_samples_apart_are_as_wide_as_by_resampling():
    rng = np.random.default_rng(2)
    shades = rng.normal(0, 25, 60)
    target, tuned = images(shades, 3), images(shades + rng.normal(4, 8, 60), 4)
    plain, clustered = (colour_change(colours_of(tuned), colours_of(target), each) for each in (None, apart(60)))
    pairs = [(getattr(plain, name), getattr(clustered, name)) for name in (
        "hue_degrees", "hue_percent", "saturation_percent", "value_percent")]
    thumbnails = [side.reshape(60, 1, -1)[:, :, :192] / 255 for side in (tuned, target)]
    pairs.append((variety_change(*thumbnails), variety_change(*thumbnails, apart(60))))
    several = [np.stack([side, side + rng.normal(0, 0.1, side.shape)], axis=1)[:, :, 0] for side in thumbnails]
    pairs.append((variety_change(*several), variety_change(*several, apart(60))))
    scores = rng.normal(size=(2, 60))
    pairs.append((defect_change(*scores, 0.0), defect_change(*scores, 0.0, apart(60))))
    for resampled, found in pairs:
        assert 0.85 < widths(found) / widths(resampled) < 1.2


def test_colours_defects_and_variety_count_people():
    """As many samples of few people tell less."""
    rng = np.random.default_rng(5)
    shades = np.repeat(rng.normal(0, 25, 10), 12)
    shift = np.repeat(rng.normal(4, 8, 10), 12)
    target, tuned = images(shades, 3), images(shades + shift, 4)
    for change in (lambda c: colour_change(colours_of(tuned), colours_of(target), c).value_percent,
                   lambda c: variety_change(*(side.reshape(120, 1, -1) / 255 for side in (tuned, target)), c),
                   lambda c: defect_change(shift[:, None], shades[:, None], 2.0, c)):
        assert widths(change(crossed(10, 12))) > 2 * widths(change(None))
