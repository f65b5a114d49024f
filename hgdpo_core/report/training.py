"""Sections of curves: training, and latent statistics against the rank."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hgdpo_core.progress import count_of
from hgdpo_core.rendering.charts import ChartSpec, line_chart
from hgdpo_core.rendering.parts import section
from hgdpo_core.training.objective import find_objective

RANK_CHARTS = (
    ChartSpec("Channel means", ("means",), "cosine distance to the best image, against the rank", 0.0, "the rank"),
    ChartSpec("Channel deviations", ("deviations",), "the same of the standard deviations", 0.0, "the rank"),
)


def latent_statistics(distances: np.ndarray | None) -> str:
    """Figure 5b of the paper: the colour preference in the data, from distances [pools, N - 1, 2]."""
    if distances is None or not len(distances):
        return ""
    rows = [{"step": float(rank), "means": means, "deviations": deviations}
            for rank, (means, deviations) in enumerate(distances.mean(axis=0).tolist(), start=2)]
    charts = "".join(line_chart(spec, rows) for spec in RANK_CHARTS)
    intro = (f"How far the latents of a pool's n-th best image are from its best one's, over {len(distances)} pools "
             "(paper, Figure 5b). If the distance of the means grows with the rank, the scorer prefers certain "
             "colours, and plain DPO would learn them: the statistic matching loss prevents this.")
    return section("Latent statistics by rank", intro, f'<div class="charts">{charts}</div>')


def training_charts(name: str, log: Sequence[Mapping[str, float]]) -> str:
    """A training by the objective of that name: one chart for each of its specs whose columns are in the log."""
    training = find_objective(name)
    charts = "".join(line_chart(spec, training.with_derived(log)) for spec in training.charts)
    if not charts:
        return ""
    broken = sum(any(not math.isfinite(value) for value in row.values()) for row in log)
    intro = (f"{count_of(len(log), 'log row')}. Faint: each row, cut at the 1st and 99th percentile; strong: moving "
             "average over 5 % of the rows, whose last value is printed.")
    if broken:
        intro += f" {count_of(broken, 'row')} held values that are not finite; those values are left out."
    return section(training.title, intro, f'<div class="charts">{charts}</div>')
