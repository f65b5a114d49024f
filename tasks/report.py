"""Write the summary and the report, and show both in the UI."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core.comparison_run import ComparisonRun
from hgdpo_core.config import ScorerConfig
from hgdpo_core.evaluate import Comparison
from hgdpo_core.rendering.grids import PairSample, pair_grid, pool_grid
from hgdpo_core.report import ReportData, headline, render_report
from hgdpo_core.report.samples import extreme_positions, random_positions, sample_pairs, sample_pools
from hgdpo_core.run import Run
from hgdpo_core.scorers.towers import OPENAI_CLIP
from hgdpo_core.stages.distances import DistanceStage
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.stages.triplets import TripletStage
from hgdpo_core.statistics.checks import Alarm
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.tune import Tuned
from tasks.options import STAGE
from tasks.times import StageTimes
from tasks.ui import show_image, show_text

PAIRS, EXTREMES, POOLS = 24, 6, 4


@task(name="report", **STAGE)
def publish(run: Run, pool: PoolPlan, scores: ShardFolder, distances: DistanceStage, triplets: TripletStage,
            lora: Tuned, sft_log: list[dict[str, float]], images: Mapping[str, PoolPlan], comparison: Comparison,
            alarms: list[Alarm], times: StageTimes) -> dict[str, Any]:
    """`summary.json` and `report.html` in `runs/<run_id>/`; returns the summary.

    `images`: those of the evaluation, of "target" and "tuned".
    """
    seconds, counts = times.recorded(run), triplets.counts()
    pools = sample_pools(pool, scores, POOLS, run.config.triplets)
    artifacts = {**_own_artifacts(run), "lora": run.store.url(f"models/{lora.model_id}"),
                 "triplets": run.store.url(triplets.folder.key), "pool": run.store.url(pool.folder.key)}
    data = ReportData(
        title=f"HG-DPO on {run.config.target.source}", training_judge=run.config.training_judge,
        counts={"prompts": len(run.prompts.prompts), "pool_images": pool.images, "triplets": counts.triplets,
                "rejected": counts.rejected, "evaluation_prompts": len(comparison.prompts)},
        pools=pools, rank_distances=distances.read(), training_log=lora.log, sft_log=sft_log,
        warnings=[alarm.message for alarm in alarms], timings=seconds, artifacts=artifacts,
        **_comparison_data(run, images, comparison))
    summary = {
        **_comparison_summary(run, comparison), "warnings": [alarm.as_dict() for alarm in alarms],
        "triplets": counts.triplets, "rejected": counts.rejected, "pool_images": pool.images,
        "timings": seconds, "found": times.found, "artifacts": artifacts}
    _write(run, data, summary)
    show_image("pool-ranking", pool_grid(pools), "Pools in their ranking, winner and loser outlined")
    return summary


@task(name="comparison report", **STAGE)
def publish_comparison(run: ComparisonRun, images: Mapping[str, PoolPlan], comparison: Comparison,
                       sweep: list[Comparison], times: StageTimes) -> dict[str, Any]:
    """`summary.json` and `report.html` of two models in `runs/<run_id>/`; returns the summary."""
    seconds = times.recorded(run)
    artifacts = {**_own_artifacts(run), "evaluation": run.store.url(f"evaluations/{comparison.evaluation_id}"),
                 "target_images": run.store.url(images["target"].folder.key),
                 "tuned_images": run.store.url(images["tuned"].folder.key)}
    data = ReportData(
        title=f"{run.config.tuned} against {run.config.target.source}",
        counts={"evaluation_prompts": len(comparison.prompts),
                "images": images["target"].images + images["tuned"].images},
        sweep=sweep, timings=seconds, artifacts=artifacts, **_comparison_data(run, images, comparison))
    weights = {"lora_weights": [point.findings() for point in sweep]} if sweep else {}
    summary = {**_comparison_summary(run, comparison), **weights, "target": run.config.target.source,
               "tuned": run.config.tuned, "timings": seconds, "found": times.found, "artifacts": artifacts}
    _write(run, data, summary)
    return summary


def _own_artifacts(run: Run | ComparisonRun) -> dict[str, str]:
    return {"report": run.store.url(run.key("report.html")), "summary": run.store.url(run.key("summary.json"))}


def _comparison_data(run: Run | ComparisonRun, images: Mapping[str, PoolPlan],
                     comparison: Comparison) -> dict[str, Any]:
    """What the report says about both models, whoever made them."""
    scorer = next(iter(comparison.win_rates))
    gains, losses = extreme_positions(comparison, scorer, EXTREMES)

    def pairs(positions: list[int]) -> list[PairSample]:
        return sample_pairs(comparison, images["target"], images["tuned"], scorer, positions)

    return {
        "preset": run.config.preset, "config": run.config, "root": run.store.root, "created_at": datetime.now(UTC),
        "command": run.command, "win_rates": comparison.win_rates, "lora_weight": comparison.lora_weight,
        "images_per_prompt": comparison.images_per_prompt, "score_changes": comparison.score_changes,
        "win_rate_intervals": comparison.win_rate_intervals, "defects": comparison.defects,
        "colour_shift": comparison.colour_shift, "colour_change": comparison.colour_change,
        "variety_change": comparison.variety_change,
        "histograms": (comparison.target_histograms, comparison.tuned_histograms),
        "pairs": pairs(random_positions(comparison, PAIRS)), "best_wins": pairs(gains), "worst_losses": pairs(losses),
        "notes": _notes(run.config.evaluation.scorers)}


def _comparison_summary(run: Run | ComparisonRun, comparison: Comparison) -> dict[str, Any]:
    return {"preset": run.config.preset, "root": run.store.root, "run_id": run.run_id, **comparison.findings(),
            "evaluation_id": comparison.evaluation_id, "evaluation_prompts": len(comparison.prompts)}


def _write(run: Run | ComparisonRun, data: ReportData, summary: Mapping[str, Any]) -> None:
    """Both files, and the same as artifacts of the UI."""
    run.store.write_bytes(run.key("report.html"), render_report(data).encode())
    run.store.write_json(run.key("summary.json"), summary)
    show_image("pairs", pair_grid(data.pairs), "Target and tuned model side by side, random held-out prompts")
    for key, samples, what in (("best-wins", data.best_wins, "gained"), ("worst-losses", data.worst_losses, "lost")):
        if samples:
            show_image(key, pair_grid(samples), f"Where the tuned model {what} most")
    places = "\n".join(f"- {name}: `{url}`" for name, url in data.artifacts.items())
    show_text("result", f"## {headline(data)}\n\n{places}", "The result in a sentence, and where report and LoRA lie")
    get_run_logger().info(headline(data))


def _notes(scorers: tuple[ScorerConfig, ...]) -> list[str]:
    notes = [f"CLIP is the checkpoint {scorer.source or OPENAI_CLIP}." for scorer in scorers if scorer.name == "clip"]
    if any(scorer.source == "figures" for scorer in scorers):
        notes.append("Where this page says PickScore, the judge is the figures world's own: a small model of "
                     "PickScore's shape, trained on drawings. Nothing here says anything about photographs.")
    return notes
