"""Numbers and histograms of scores, worked out by hand."""

import math

import numpy as np
import pytest

from hgdpo_core.statistics.distributions import score_histogram, summarise_scores, text_histogram

NAN = float("nan")


def test_distribution_of_finite_scores():
    summary = summarise_scores(np.array([[1.0, 2], [3, 4], [NAN, math.inf]]))
    assert (summary.n, summary.not_finite, summary.mean, summary.median) == (6, 2, 2.5, 2.5)
    assert summary.std == pytest.approx(math.sqrt(1.25)) and (summary.min, summary.max) == (1, 4)
    assert summary.p5 == pytest.approx(1.15) and summary.p95 == pytest.approx(3.85)
    assert summarise_scores(np.array([NAN])).mean is None


def test_histograms_share_their_edges():
    edges, (before, now) = score_histogram(np.array([0.0, 1, 1, NAN]), np.array([[4.0], [3.5]]), bins=4)
    assert edges == [0, 1, 2, 3, 4] and before == [1, 2, 0, 0] and now == [0, 0, 0, 2]
    assert score_histogram(np.array([NAN])) == ([], [[]])


def test_text_histograms_read_as_bars():
    text = text_histogram({"winner": np.array([0.0, 4, 4, 4]), "loser": np.array([1.0, NAN])}, bins=2)
    assert text.splitlines() == [
        "              winner                      loser",
        "0.00 to 2.00  1 ########                  1 ########",
        "2.00 to 4.00  3 ########################  0"]
