"""Distributions of scores: summaries, histograms, histograms as text. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

BINS = 24
TEXT_BINS = 12
TEXT_WIDTH = 24


@dataclass(frozen=True)
class ScoreSummary:
    """The distribution of the finite scores; its numbers are None if there are none."""

    n: int
    not_finite: int
    mean: float | None
    std: float | None
    min: float | None
    p5: float | None
    median: float | None
    p95: float | None
    max: float | None


def summarise_scores(scores: np.ndarray) -> ScoreSummary:
    """The distribution of scores of any shape; `std` is that of a whole population."""
    values = np.asarray(scores, dtype=np.float64).ravel()
    finite = values[np.isfinite(values)]
    if not finite.size:
        return ScoreSummary(values.size, values.size, *[None] * 7)
    p5, median, p95 = (float(value) for value in np.percentile(finite, [5, 50, 95]))
    return ScoreSummary(values.size, values.size - finite.size, float(finite.mean()), float(finite.std()),
                        float(finite.min()), p5, median, p95, float(finite.max()))


def score_histogram(*arrays: np.ndarray, bins: int = BINS) -> tuple[list[float], list[list[int]]]:
    """Edges [bins + 1] that span all finite scores, and each array's counts [bins] between them."""
    finite = [np.asarray(array, dtype=np.float64).ravel() for array in arrays]
    finite = [array[np.isfinite(array)] for array in finite]
    together = np.concatenate(finite)
    if not together.size:
        return [], [[] for _ in arrays]
    edges = np.histogram_bin_edges(together, bins=bins)
    return edges.tolist(), [np.histogram(array, bins=edges)[0].tolist() for array in finite]


def text_histogram(columns: Mapping[str, np.ndarray], bins: int = TEXT_BINS) -> str:
    """Bars of characters, one line per bin and one column per array; for output without colours and images."""
    edges, counts = score_histogram(*columns.values(), bins=bins)
    ranges = [f"{low:.2f} to {high:.2f}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    most = max((max(column) for column in counts if column), default=0)
    digits = len(f"{most:,}")
    width, margin = digits + 1 + TEXT_WIDTH, max(map(len, ranges), default=0)
    lines = [" " * margin + "".join(f"  {name:<{width}}" for name in columns)]
    for text, row in zip(ranges, zip(*counts, strict=True), strict=True):
        cells = (f"{count:>{digits},} {'#' * -(-count * TEXT_WIDTH // most)}" for count in row)
        lines.append(f"{text:>{margin}}" + "".join(f"  {cell:<{width}}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)
