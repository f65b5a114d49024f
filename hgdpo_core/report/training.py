"""Sections of curves: of training, and of the latents against the rank."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hgdpo_core.rendering.charts import ChartSpec, line_chart
from hgdpo_core.rendering.parts import count_of, section

DPO_CHARTS = (
    ChartSpec("Loss", ("loss",), "all terms together, weighted"),
    ChartSpec("DPO loss", ("dpo_loss",), "dashed: log 2, policy equal to reference", math.log(2)),
    ChartSpec("Statistic matching loss", ("stat_loss",), "0: colours stay where they were"),
    ChartSpec("Margin", ("margin",), "below 0: winners gained on losers", 0.0),
    ChartSpec("Implicit accuracy", ("implicit_accuracy",), "share of pairs with a margin below 0", 0.5),
    ChartSpec("Denoising error", ("winner_error", "loser_error"), "policy: winner solid, loser dashed"),
    ChartSpec("Rise of the error", ("winner_rise", "loser_rise"), "against the reference: winner solid, loser dashed; "
              "both far above 0 is collapse", 0.0),
    ChartSpec("Gradient norm", ("grad_norm",), "before clipping"),
    ChartSpec("Learning rate", ("learning_rate",), "after warm-up and schedule"),
)
RANK_CHARTS = (
    ChartSpec("Channel means", ("means",), "cosine distance to the best image, against the rank", 0.0, "the rank"),
    ChartSpec("Channel deviations", ("deviations",), "the same of the standard deviations", 0.0, "the rank"),
)
SFT_CHARTS = (
    ChartSpec("Loss", ("loss",), "denoising error of the target model"),
    ChartSpec("Gradient norm", ("grad_norm",), "before clipping"),
    ChartSpec("Learning rate", ("learning_rate",), "after warm-up and schedule"),
)


def latent_statistics(distances: np.ndarray | None) -> str:
    """Figure 5b of the paper: what preference data teach about colours, from distances [pools, N - 1, 2]."""
    if distances is None or not len(distances):
        return ""
    rows = [{"step": float(rank), "means": means, "deviations": deviations}
            for rank, (means, deviations) in enumerate(distances.mean(axis=0).tolist(), start=2)]
    drawn = "".join(line_chart(spec, rows) for spec in RANK_CHARTS)
    intro = (f"How far the latents of a pool's n-th best image are from its best one's, over {len(distances)} pools "
             "(paper, Figure 5b). Where the means drift apart with the rank, the judge prefers certain colours, and "
             "plain DPO would learn them: that is what the statistic matching loss is for.")
    return section("Latent statistics by rank", intro, f'<div class="charts">{drawn}</div>')


def charts(title: str, specs: Sequence[ChartSpec], log: Sequence[Mapping[str, float]]) -> str:
    """A chart for each spec whose columns the log has."""
    drawn = "".join(line_chart(spec, log) for spec in specs)
    if not drawn:
        return ""
    broken = sum(any(not math.isfinite(value) for value in row.values()) for row in log)
    intro = (f"{count_of(len(log), 'log row')}. Faint: each row, cut at the 1st and 99th percentile; strong: moving "
             "average over 5 % of the rows, whose last value is printed.")
    if broken:
        intro += f" {count_of(broken, 'row')} held values that are not finite; those values are left out."
    return section(title, intro, f'<div class="charts">{drawn}</div>')


def with_rises(log: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The DPO log with `winner_rise` and `loser_rise`: the share by which an error stands above the reference's."""
    rows = []
    for row in log:
        rises = {f"{side}_rise": row[f"{side}_error"] / row[f"reference_{side}_error"] - 1 for side in
                 ("winner", "loser") if row.get(f"reference_{side}_error") and f"{side}_error" in row}
        rows.append({**row, **rises})
    return rows
