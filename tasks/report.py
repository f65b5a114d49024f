"""Write summary and report, and show both in the UI."""

import socket
from collections.abc import Mapping
from typing import Any

from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed

from hgdpo_core import pipeline
from hgdpo_core.evaluate import Comparison
from hgdpo_core.progress import StageTimes
from hgdpo_core.rendering.grids import pair_grid, pool_grid
from hgdpo_core.report import ReportData, headline
from hgdpo_core.report.summary import Published, write_comparison_report
from hgdpo_core.run import Run
from hgdpo_core.run.comparison import ComparisonRun
from hgdpo_core.stages.pool import PoolPlan
from tasks.options import stage_task
from tasks.people import show_people
from tasks.ui import show_image, show_text


@stage_task("report")
def publish(run: Run, result: pipeline.Result, times: StageTimes) -> Published:
    """`summary.json` and `report.html` in `runs/<run_id>/`, and their images in the UI."""
    published = pipeline.write_report(run, result, times)
    _show_pairs(published.data)
    show_people(published.data.people)
    if pools := published.data.pools:  # not of a run on prompts, or on others' pairs
        show_image("pool-ranking", pool_grid(pools), "Pools in their ranking, winner and loser outlined")
    return published


@stage_task("comparison report")
def publish_comparison(run: ComparisonRun, images: Mapping[str, PoolPlan], comparison: Comparison,
                       sweep: list[Comparison], times: StageTimes) -> Published:
    """`summary.json` and `report.html` of two models in `runs/<run_id>/`, and their images in the UI."""
    published = write_comparison_report(run, images, comparison, sweep, seconds=times.seconds, cached=times.cached)
    _show_pairs(published.data)
    show_people(published.data.people)
    return published


def conclude(published: Published) -> State[dict[str, Any]]:
    """The end of a flow run: its result as an artifact of its own, and in a sentence as its state."""
    data, sentence = published.data, headline(published.data)
    locations = "\n".join(f"- {name}: `{url}`" for name, url in data.artifacts.items())
    if data.root.startswith("file:"):  # other machines cannot open it
        locations = f"Files on the machine `{socket.gethostname()}`:\n\n{locations}"
    warnings = "".join(f"\n\n**{warning}**" for warning in data.warnings)
    show_text("result", f"## {sentence}{warnings}\n\n{locations}", "The result in a sentence; report and LoRA")
    get_run_logger().info(sentence)
    return Completed(message=sentence, data=published.summary)


def _show_pairs(data: ReportData) -> None:
    show_image("pairs", pair_grid(data.pairs), "Target and tuned model side by side, random held-out prompts")
    for key, samples, what in (("best-wins", data.best_wins, "gained"), ("worst-losses", data.worst_losses, "lost")):
        if samples:
            show_image(key, pair_grid(samples), f"Where the tuned model {what} most")
