"""Write summary and report, and show both in the UI."""

from collections.abc import Mapping
from typing import Any

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core import pipeline
from hgdpo_core.comparison_run import ComparisonRun
from hgdpo_core.evaluate import Comparison
from hgdpo_core.progress import StageTimes
from hgdpo_core.rendering.grids import pair_grid, pool_grid
from hgdpo_core.report import ReportData, headline
from hgdpo_core.report.summary import write_comparison_report
from hgdpo_core.run import Run
from hgdpo_core.stages.pool import PoolPlan
from tasks.options import STAGE
from tasks.ui import show_image, show_text


@task(name="report", **STAGE)
def publish(run: Run, result: pipeline.Result, times: StageTimes) -> dict[str, Any]:
    """`summary.json` and `report.html` in `runs/<run_id>/`; returns the summary."""
    published = pipeline.write_report(run, result, times)
    _show(published.data)
    show_image("pool-ranking", pool_grid(published.data.pools), "Pools in their ranking, winner and loser outlined")
    return published.summary


@task(name="comparison report", **STAGE)
def publish_comparison(run: ComparisonRun, images: Mapping[str, PoolPlan], comparison: Comparison,
                       sweep: list[Comparison], times: StageTimes) -> dict[str, Any]:
    """`summary.json` and `report.html` of two models in `runs/<run_id>/`; returns the summary."""
    published = write_comparison_report(run, images, comparison, sweep, seconds=times.seconds, cached=times.cached)
    _show(published.data)
    return published.summary


def _show(data: ReportData) -> None:
    """The report as artifacts of the UI."""
    show_image("pairs", pair_grid(data.pairs), "Target and tuned model side by side, random held-out prompts")
    for key, samples, what in (("best-wins", data.best_wins, "gained"), ("worst-losses", data.worst_losses, "lost")):
        if samples:
            show_image(key, pair_grid(samples), f"Where the tuned model {what} most")
    locations = "\n".join(f"- {name}: `{url}`" for name, url in data.artifacts.items())
    show_text("result", f"## {headline(data)}\n\n{locations}", "The result in a sentence; report and LoRA")
    get_run_logger().info(headline(data))
