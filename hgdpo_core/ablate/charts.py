"""The ablation's plots as PNG, in the colours of the report."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from hgdpo_core.ablate.arms import Arm, PlannedTable
from hgdpo_core.ablate.program import Shared
from hgdpo_core.ablate.result import Results
from hgdpo_core.ablate.settings import World
from hgdpo_core.ablate.tables import TITLES, WORLDS
from hgdpo_core.images import decode_image
from hgdpo_core.rendering.grids import pool_grid, row_grid
from hgdpo_core.report.samples import sample_pools
from hgdpo_core.scorers import scorer_title
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.statistics.intervals import Estimate

INK, FAINT, LINE, ACCENT, SECOND = "#181a20", "#5b616d", "#dfe1e6", "#1665c0", "#b4440d"
COLOURS = (ACCENT, SECOND, FAINT, INK)
DPI = 150
CHARACTERS_PER_INCH = 12  # of a title
REFERENCE = {"color": FAINT, "linewidth": 1, "linestyle": (0, (4, 4))}
"""Style of the line at the value of no change."""


def win_rate_chart(results: Results, planned: PlannedTable) -> bytes:
    """One row per arm: the win rate by every scorer with its interval, the single trainings as small dots."""
    series = {}
    for scorer in results.scorers(planned):
        rates = [results.win_rate(row.arm, scorer).scaled(100) for row in planned.rows]
        seeds = [[record.win_rate[scorer]["rate"] for record in results.records[row.arm]] for row in planned.rows]
        dots = [[100 * rate for rate in row if rate is not None] for row in seeds]
        series[_short_title(scorer)] = list(zip(rates, dots, strict=True))
    return _row_chart(planned, series, 50, "prompts won against the target, % (small dots: single trainings)")


def baseline_chart(results: Results, planned: PlannedTable) -> bytes:
    """Table 1, one row per baseline: the win rate of HG-DPO against it by every scorer, with its interval."""
    ours, *others = planned.rows
    series = {_short_title(scorer): [(results.win_rate_against(ours.arm, row.arm, scorer).scaled(100), [])
                                     for row in others] for scorer in results.scorers(planned)}
    return _row_chart(replace(planned, rows=tuple(others)), series, 50, "prompts HG-DPO won against the baseline, %")


def colour_chart(results: Results, planned: PlannedTable) -> bytes:
    """One row per arm: how far red minus blue, saturation and value shifted."""
    titles = {"saturation": "saturation, %", "warmth": "red minus blue, levels of 255", "value": "value, %"}
    series = {title: [(results.colour(row.arm, name), []) for row in planned.rows] for name, title in titles.items()}
    return _row_chart(planned, series, 0, "tuned minus target, with 95 % intervals")


def _short_title(scorer: str) -> str:
    return "PickScore, tinted" if scorer == "tinted" else scorer_title(scorer)  # the chart's title explains "tinted"


def _row_chart(planned: PlannedTable, series: Mapping[str, Sequence[tuple[Estimate, list[float]]]], level: float,
               meaning: str) -> bytes:
    """Estimates with their intervals and dots, one row per arm and one colour per series."""
    figure, (axes,) = _figure(6.8, 1.1 + 0.46 * len(planned.rows), TITLES[planned.number], planned.world)
    for number, (title, values) in enumerate(series.items()):
        colour, shift = COLOURS[number % 4], 0.21 * (number - (len(series) - 1) / 2)
        for row, (value, dots) in enumerate(values):
            y = row + shift
            axes.plot(dots, [y] * len(dots), ".", color=colour, alpha=0.35, markersize=5)
            if value.value is not None:
                axes.plot([value.ci_low, value.ci_high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
                axes.plot([value.value], [y], "o", color=colour, markersize=6, label=None if row else title)
    axes.axvline(level, **REFERENCE)
    axes.set_yticks(range(len(planned.rows)), [row.label for row in planned.rows])
    axes.invert_yaxis()
    axes.set_xlabel(meaning)
    if len(series) > 1:
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(series))
    return _png(figure)


def distance_chart(results: Results, world: World) -> bytes:
    """Figure 5b: two curves over the rank."""
    distances = results.distances[world]
    ranks, pools = np.arange(2, distances.shape[1] + 2), len(distances)
    figure, (axes,) = _figure(5.4, 3.6, "Figure 5b: latent statistics against rank", world)
    for i, (title, colour, style) in enumerate((("channel means", ACCENT, "-"),
                                                ("channel standard deviations", SECOND, "--"))):
        mean = distances[..., i].mean(axis=0)
        error = 1.96 * distances[..., i].std(axis=0, ddof=min(1, pools - 1)) / pools**0.5
        axes.plot(ranks, mean, style, color=colour, label=title)
        axes.fill_between(ranks, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("rank n in the pool")
    axes.set_ylabel("cosine distance to the best image")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _png(figure)


def weight_chart(results: Results, planned: PlannedTable) -> bytes:
    """Figure 8: win rate and diversity against the LoRA's weight."""
    scorers, rows = results.scorers(planned), _by_weight(planned)
    figure, (left, right) = _figure(8.6, 3.6, TITLES["8"], planned.world, panels=2)
    for number, scorer in enumerate(scorers):
        points = [(arm.lora_weight, results.win_rate(arm, scorer).scaled(100)) for _, arm in rows]
        _curve(left, points, COLOURS[number % 4], _short_title(scorer))
    left.axhline(50, **REFERENCE)
    left.set_ylabel("prompts won against the target, %")
    if len(scorers) > 1:
        left.legend(frameon=False)
    diversity = [(0.0, results.diversity_of(None)), *((arm.lora_weight, results.diversity_of(arm)) for _, arm in rows)]
    _curve(right, [(weight, value) for weight, value in diversity if value is not None], SECOND, "diversity")
    right.set_ylabel("diversity: mean of 1 - cosine")
    for axes in (left, right):
        axes.set_xlim(left=-0.05)
        axes.set_xlabel("LoRA weight (0: the target)")
    return _png(figure)


def pool_images(results: Results, shared: Shared, world: World, count: int = 3) -> Image.Image:
    """Figure 6: the first pools, ranked by the world's scorer."""
    return pool_grid(sample_pools(shared.pool, shared.scores[world], count, results.ablation.run.config.triplets))


def weight_images(results: Results, planned: PlannedTable, prompt: str) -> Image.Image:
    """Figure 8: one prompt from several seeds, one row per LoRA weight, by the first training."""
    measured = [("LoRA weight 0 (target)", results.target_diversity),
                *((f"LoRA {label}", results.diversity[arm][0]) for label, arm in _by_weight(planned))]
    return row_grid(prompt, [(label, _images(item.pool, prompt)) for label, item in measured if item])


def baseline_images(results: Results, planned: PlannedTable) -> Image.Image:
    """Figure 17: one prompt from several seeds, one row per model, by the first training."""
    prompt = results.ablation.run.evaluation_prompts.prompts[0]
    measured = [("target", results.target_diversity), *((row.label, results.diversity[row.arm][0])
                                                        for row in planned.rows)]
    return row_grid(prompt, [(label, _images(item.pool, prompt)) for label, item in measured if item])


def _by_weight(planned: PlannedTable) -> list[tuple[str, Arm]]:
    return sorted(((row.label, row.arm) for row in planned.rows), key=lambda row: row[1].lora_weight)


def _images(pool: PoolPlan, prompt: str) -> list[Image.Image]:
    """All images of a prompt in a pool, in the order of their indices."""
    rows = [row for shard in pool.shards if prompt in shard.prompts
            for row in pool.folder.read(shard.index, ["prompt", "index", "image"]).to_pylist()
            if row["prompt"] == prompt]
    return [decode_image(row["image"]) for row in sorted(rows, key=lambda row: row["index"])]


def _curve(axes: Any, points: Sequence[tuple[float, Estimate]], colour: str, label: str) -> None:
    known = [(x, value) for x, value in points if value.value is not None]
    for x, value in known:
        axes.plot([x, x], [value.ci_low, value.ci_high], color=colour, linewidth=1.5)
    axes.plot([x for x, _ in known], [value.value for _, value in known], "o-", color=colour, markersize=5, label=label)


def _figure(width: float, height: float, title: str, world: World, panels: int = 1) -> tuple[Figure, Sequence[Any]]:
    """A figure with its title over styled, empty panels side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    columns = int(width * CHARACTERS_PER_INCH)
    lines = [*textwrap.wrap(title, columns), *textwrap.wrap(WORLDS[world], columns)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11, color=INK)
    panel_axes = figure.subplots(1, panels, squeeze=False)[0]
    for axes in panel_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LINE)
        axes.tick_params(colors=FAINT, labelsize=9, length=0)
        axes.grid(color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=FAINT, fontsize=9)
    return figure, panel_axes


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()
