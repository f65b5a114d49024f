"""What a run or a comparison leaves to read: `summary.json` and `report.html` in `runs/<run_id>/`."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from hgdpo_core.built_in import SCORER_NOTE, is_built_in
from hgdpo_core.comparison_run import ComparisonRun
from hgdpo_core.config import ScorerConfig
from hgdpo_core.errors import StorageError
from hgdpo_core.evaluate import Comparison
from hgdpo_core.rendering.grids import PairSample
from hgdpo_core.report.data import ReportData
from hgdpo_core.report.page import render_report
from hgdpo_core.report.samples import extreme_positions, random_positions, sample_pairs, sample_pools
from hgdpo_core.run import Run
from hgdpo_core.scorers.towers import OPENAI_CLIP
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.stages.triplets import TripletCounts
from hgdpo_core.statistics.checks import Alarm
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.tune import Tuned

PAIRS, EXTREMES, POOLS = 24, 6, 4


@dataclass(frozen=True)
class Published:
    """What was written: the values on the page, and `summary.json`."""

    data: ReportData
    summary: dict[str, Any]


def write_run_report(run: Run, pool: PoolPlan, scores: ShardFolder, distances: np.ndarray, triplets: ShardFolder,
                     counts: TripletCounts, lora: Tuned, sft_log: Sequence[Mapping[str, float]],
                     images: Mapping[str, PoolPlan], comparison: Comparison, alarms: Sequence[Alarm], *,
                     seconds: Mapping[str, float], cached: Sequence[str]) -> Published:
    """Summary and report of a whole run.

    `distances`: of `read_distances`; `images`: those of the evaluation, of "target" and "tuned"; `seconds` by stage, in
    the order of the run; `cached` names the stages that had nothing to make. InputError for a page that grows too
    large, StorageError where the store takes no file.
    """
    artifacts = {**_own_artifacts(run), "lora": run.store.url(f"models/{lora.model_id}"),
                 "triplets": run.store.url(triplets.key), "pool": run.store.url(pool.folder.key)}
    timings = _making_seconds(run, seconds, cached)
    data = ReportData(
        title=f"HG-DPO on {run.config.target.source}", training_judge=run.config.training_judge,
        counts={"prompts": len(run.prompts.prompts), "pool_images": pool.images, "triplets": counts.triplets,
                "rejected": counts.rejected, "evaluation_prompts": len(comparison.prompts)},
        pools=sample_pools(pool, scores, POOLS, run.config.triplets), rank_distances=distances,
        objective=lora.objective, training_log=lora.log, sft_log=sft_log,
        warnings=[alarm.message for alarm in alarms], timings=timings, artifacts=artifacts,
        **_comparison_data(run, images, comparison))
    return _write(run, data, {
        **_comparison_summary(run, comparison), "warnings": [alarm.as_dict() for alarm in alarms],
        "triplets": counts.triplets, "rejected": counts.rejected, "pool_images": pool.images,
        "lora_id": lora.model_id, "timings": timings, "found": list(cached), "artifacts": artifacts})


def write_comparison_report(run: ComparisonRun, images: Mapping[str, PoolPlan], comparison: Comparison,
                            sweep: Sequence[Comparison], *, seconds: Mapping[str, float],
                            cached: Sequence[str]) -> Published:
    """Summary and report of two models; `sweep` holds the tuned LoRA at further weights, the rest as for a run."""
    artifacts = {**_own_artifacts(run), "evaluation": run.store.url(f"evaluations/{comparison.evaluation_id}"),
                 "target_images": run.store.url(images["target"].folder.key),
                 "tuned_images": run.store.url(images["tuned"].folder.key)}
    timings = _making_seconds(run, seconds, cached)
    data = ReportData(
        title=f"{run.config.tuned} against {run.config.target.source}",
        counts={"evaluation_prompts": len(comparison.prompts),
                "images": images["target"].images + images["tuned"].images},
        sweep=sweep, timings=timings, artifacts=artifacts, **_comparison_data(run, images, comparison))
    weights = {"lora_weights": [point.findings() for point in sweep]} if sweep else {}
    return _write(run, data, {
        **_comparison_summary(run, comparison), **weights, "target": run.config.target.source,
        "tuned": run.config.tuned, "timings": timings, "found": list(cached), "artifacts": artifacts})


def _write(run: Run | ComparisonRun, data: ReportData, summary: dict[str, Any]) -> Published:
    run.store.write_bytes(run.key("report.html"), render_report(data).encode())
    run.store.write_json(run.key("summary.json"), summary)
    return Published(data, summary)


def _own_artifacts(run: Run | ComparisonRun) -> dict[str, str]:
    return {"report": run.store.url(run.key("report.html")), "summary": run.store.url(run.key("summary.json"))}


def _making_seconds(run: Run | ComparisonRun, seconds: Mapping[str, float], cached: Sequence[str]) -> dict[str, float]:
    """Seconds by stage; for a cached one those in which an earlier run of the same settings made it."""
    earlier: dict[str, float] = {}
    with suppress(StorageError):    # none yet, or not readable: this run's times are all there is
        earlier = run.store.read_json(run.key("summary.json"))["timings"]
    return {name: earlier.get(name, value) if name in cached else value for name, value in seconds.items()}


def _comparison_data(run: Run | ComparisonRun, images: Mapping[str, PoolPlan],
                     comparison: Comparison) -> dict[str, Any]:
    """The fields of ReportData on both models, in a run and in a comparison alike."""
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


def _notes(scorers: Sequence[ScorerConfig]) -> list[str]:
    notes = [f"CLIP is the checkpoint {scorer.source or OPENAI_CLIP}." for scorer in scorers if scorer.name == "clip"]
    if any(is_built_in(scorer.source) for scorer in scorers):
        notes.append(f"Where this page says PickScore, {SCORER_NOTE}.")
    return notes
