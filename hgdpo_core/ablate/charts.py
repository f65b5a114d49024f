"""The ablation's plots as PNG, in the colours of the report."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from hgdpo_core.ablate.arms import PlannedTable
from hgdpo_core.ablate.estimates import scaled
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
SHORT_TITLES = {"tinted": "PickScore, tinted"}  # the chart's own title says what tinted means


def win_rate_chart(results: Results, planned: PlannedTable) -> bytes:
    """A row an arm: the win rate by every scorer with its interval, the single trainings as small dots."""
    series = {}
    for scorer in results.records[planned.rows[0].arm][0].win_rate:
        rates = [scaled(results.win_rate(row.arm, scorer), 100) for row in planned.rows]
        seeds = [[record.win_rate[scorer]["rate"] for record in results.records[row.arm]] for row in planned.rows]
        dots = [[100 * rate for rate in row if rate is not None] for row in seeds]
        series[SHORT_TITLES.get(scorer, scorer_title(scorer))] = list(zip(rates, dots, strict=True))
    return _row_chart(planned, series, 50, "prompts won against the target, % (small dots: single trainings)")


def colour_chart(results: Results, planned: PlannedTable) -> bytes:
    """A row an arm: how far red minus blue, saturation and value moved."""
    series = {title: [(results.colour(row.arm, name), []) for row in planned.rows]
              for name, title in (("saturation", "saturation, %"), ("warmth", "red minus blue, levels of 255"),
                                  ("value", "value, %"))}
    return _row_chart(planned, series, 0, "tuned minus target, with 95 % intervals")


def _row_chart(planned: PlannedTable, series: Mapping[str, Sequence[tuple[Estimate, list[float]]]], level: float,
               meaning: str) -> bytes:
    """Estimates with their intervals and dots, a row an arm and a colour for each series."""
    figure, axes = _figure(6.8, 1.1 + 0.46 * len(planned.rows))
    for number, (title, values) in enumerate(series.items()):
        colour, shift = COLOURS[number % 4], 0.21 * (number - (len(series) - 1) / 2)
        for place, (value, dots) in enumerate(values):
            axes.plot(dots, [place + shift] * len(dots), ".", color=colour, alpha=0.35, markersize=5)
            _whisker(axes, value, place + shift, colour, title if place == 0 else None)
    axes.axvline(level, color=FAINT, linewidth=1, linestyle=(0, (4, 4)))
    axes.set_yticks(range(len(planned.rows)), [row.label for row in planned.rows])
    axes.invert_yaxis()
    axes.set_xlabel(meaning)
    if len(series) > 1:
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(series))
    return _save(figure, axes, TITLES[planned.number], planned.world)


def distance_chart(results: Results, world: World) -> bytes:
    """Figure 5b: two curves over the rank."""
    distances = results.distances[world]
    ranks, pools = np.arange(2, distances.shape[1] + 2), len(distances)
    figure, axes = _figure(5.4, 3.6)
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
    return _save(figure, axes, "Figure 5b: latent statistics against rank", world)


def weight_chart(results: Results, planned: PlannedTable) -> bytes:
    """Figure 8: win rate and diversity against the LoRA's weight."""
    scorers = list(results.records[planned.rows[0].arm][0].win_rate)
    rows = sorted(planned.rows, key=lambda row: row.arm.lora_weight)
    weights = [row.arm.lora_weight for row in rows]
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, scorer in enumerate(scorers):
        _curve(left, weights, [scaled(results.win_rate(row.arm, scorer), 100) for row in rows],
               COLOURS[number % 4], SHORT_TITLES.get(scorer, scorer_title(scorer)))
    left.axhline(50, color=FAINT, linewidth=1, linestyle=(0, (4, 4)))
    left.set_ylabel("prompts won against the target, %")
    if len(scorers) > 1:
        left.legend(frameon=False)
    measured = [(row.arm.lora_weight, value) for row in rows if (value := results.diversity_of(row.arm)) is not None]
    target = results.diversity_of(None)
    points = [(0.0, target), *measured] if target is not None else measured
    _curve(right, [weight for weight, _ in points], [value for _, value in points], SECOND, "diversity")
    right.set_ylabel("diversity: mean of 1 - cosine")
    for axes in (left, right):
        _style(axes)
        axes.set_xlim(left=-0.05)
        axes.set_xlabel("LoRA weight (0: the target)")
    _entitle(figure, TITLES["8"], planned.world)
    return _png(figure)


def pool_picture(results: Results, shared: Shared, world: World, count: int = 3) -> Image.Image:
    """Figure 6: the first pools in the ranking of the world's judge."""
    return pool_grid(sample_pools(shared.pool, shared.scores[world], count, results.ablation.run.config.triplets))


def weight_picture(results: Results, planned: PlannedTable, prompt: str) -> Image.Image:
    """Figure 8: one prompt from several seeds, a row a LoRA weight, by the first training."""
    rows = sorted(planned.rows, key=lambda row: row.arm.lora_weight)
    drawn = [("LoRA weight 0 (target)", results.target_diversity),
             *((f"LoRA {row.label}", results.diversity[row.arm][0]) for row in rows)]
    return row_grid(prompt, [(label, _images(measured.pool, prompt)) for label, measured in drawn if measured])


def _images(pool: PoolPlan, prompt: str) -> list[Image.Image]:
    """All images of a prompt in a pool, in the order of their indices."""
    rows = [row for shard in pool.shards if prompt in shard.prompts
            for row in pool.folder.read(shard.index, ["prompt", "index", "image"]).to_pylist()
            if row["prompt"] == prompt]
    return [decode_image(row["image"]) for row in sorted(rows, key=lambda row: row["index"])]


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _whisker(axes: Any, value: Estimate, place: float, colour: str, label: str | None) -> None:
    if value.value is None:
        return
    axes.plot([value.ci_low, value.ci_high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot([value.value], [place], "o", color=colour, markersize=6, label=label)


def _curve(axes: Any, places: Sequence[float], values: Sequence[Estimate], colour: str, label: str) -> None:
    known = [(place, value) for place, value in zip(places, values, strict=True) if value.value is not None]
    for place, value in known:
        axes.plot([place, place], [value.ci_low, value.ci_high], color=colour, linewidth=1.5)
    axes.plot([place for place, _ in known], [value.value for _, value in known], "o-", color=colour, markersize=5,
              label=label)


def _save(figure: Figure, axes: Any, title: str, world: World) -> bytes:
    _style(axes)
    _entitle(figure, title, world)
    return _png(figure)


def _entitle(figure: Figure, title: str, world: World) -> None:
    width = int(figure.get_figwidth() * CHARACTERS_PER_INCH)
    lines = [*textwrap.wrap(title, width), *textwrap.wrap(WORLDS[world], width)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11, color=INK)


def _style(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=FAINT, labelsize=9, length=0)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=FAINT, fontsize=9)


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()
