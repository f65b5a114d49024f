"""The output of a run or a comparison: `summary.json` and `report.html` in `runs/<run_id>/`."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from hgdpo_core.built_in import SCORER_NOTE, is_built_in
from hgdpo_core.config import ScorerConfig
from hgdpo_core.errors import StorageError
from hgdpo_core.evaluate import Comparison
from hgdpo_core.rendering.grids import PairSample
from hgdpo_core.report.data import ForeignPairs, ReportData
from hgdpo_core.report.page import render_report
from hgdpo_core.report.people import read_people
from hgdpo_core.report.samples import extreme_positions, random_positions, sample_foreign, sample_pairs, sample_pools
from hgdpo_core.run import Run
from hgdpo_core.run.comparison import ComparisonRun
from hgdpo_core.scorers.towers import OPENAI_CLIP
from hgdpo_core.stages.pair_sets import PairSetStage
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.stages.triplets import TripletCounts
from hgdpo_core.statistics.checks import RunWarning
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.objective import find_objective
from hgdpo_core.training.tune import Tuned

PAIRS, EXTREMES, POOLS, PAIRS_SHOWN = 24, 6, 4, 6


@dataclass(frozen=True)
class Published:
    """What was written: the data of the page, and `summary.json`."""

    data: ReportData
    summary: dict[str, Any]


@dataclass(frozen=True)
class RankedData:
    """A run's pool and its triplets, as a report shows them; `distances` are those of `read_distances`."""

    pool: PoolPlan
    scores: ShardFolder
    distances: np.ndarray
    triplets: ShardFolder
    triplet_counts: TripletCounts

    @property
    def counts(self) -> dict[str, int]:
        """Images of the pool, and those that were finished where it was raced; triplets, and pools without one."""
        pool = self.pool
        finished = {"finished_images": sum(pool.expected_rows(pool.indices).values())} if pool.pool.race else {}
        return {"pool_images": pool.images, **finished, "triplets": self.triplet_counts.triplets,
                "rejected": self.triplet_counts.rejected}


@dataclass(frozen=True)
class ForeignData:
    """Pairs that others labelled, as a report shows them."""

    stage: PairSetStage

    @property
    def counts(self) -> dict[str, int]:
        counts = self.stage.counts()
        return {"foreign_pairs_read": counts.read, "triplets": counts.triplets, "rejected": counts.rejected}

    @property
    def facts(self) -> dict[str, Any]:
        """What summary and model card say of them, as JSON values."""
        pairs, counts = self.stage.pairs, self.stage.counts()
        return {"data_set": pairs.name, "on_hub": pairs.on_hub, "revision": pairs.revision, "licence": pairs.licence,
                "human_only": pairs.source.human_only, "read": counts.read, "used": counts.triplets,
                "dropped": counts.reasons, "image_size": list(self.stage.image_size)}


def write_run_report(run: Run, trained_on: RankedData | ForeignData | None, lora: Tuned,
                     sft_log: Sequence[Mapping[str, float]], images: Mapping[str, PoolPlan], comparison: Comparison,
                     warnings: Sequence[RunWarning], *, seconds: Mapping[str, float],
                     cached: Sequence[str]) -> Published:
    """Summary and report of a whole run; `trained_on` is None for one that is trained on prompts alone.

    `images`: those of the evaluation, of "target" and "tuned"; `seconds` by stage, in the order of the run; `cached`
    names the stages that had nothing to make. InputError for a page that grows too large, StorageError if a file cannot
    be written.
    """
    objective = find_objective(lora.objective)
    keys, shown = {"lora": f"models/{lora.model_id}"}, {}
    counts, summary = {} if trained_on is None else trained_on.counts, dict[str, Any]()
    title = f"{objective.method or objective.title} on {run.config.target.source}"
    if isinstance(trained_on, RankedData):
        keys |= {"triplets": trained_on.triplets.key, "pool": trained_on.pool.folder.key}
        shown = {"rank_distances": trained_on.distances,
                 "pools": sample_pools(trained_on.pool, trained_on.scores, POOLS, run.config.triplets)}
    elif trained_on is not None:
        stage = trained_on.stage
        keys["triplets"], summary["foreign_pairs"] = stage.folder.key, trained_on.facts
        shown = {"foreign": ForeignPairs(stage.pairs.describe(), sample_foreign(stage, PAIRS_SHOWN),
                                         stage.counts().reasons)}
        title = f"{objective.title} on foreign pairs of {stage.pairs.name}: {run.config.target.source}"
    summary |= {"warnings": [warning.as_dict() for warning in warnings], "pool_images": 0, "triplets": 0, "rejected": 0,
                **counts, "lora_id": lora.model_id}
    if (stated := run.target.schedule()) and run.images is None:  # else what was tuned is a folder
        summary["scheduler"] = stated
    return _write(
        run, images, comparison, seconds, cached, keys, summary, title=title,
        training_scorer=run.config.training_scorer, objective=lora.objective, training_log=lora.log, sft_log=sft_log,
        counts={"prompts": len(run.prompts.prompts), **counts,
                "evaluation_prompts": len(comparison.prompts)}, warnings=[item.message for item in warnings], **shown)


def write_comparison_report(run: ComparisonRun, images: Mapping[str, PoolPlan], comparison: Comparison,
                            sweep: Sequence[Comparison], *, seconds: Mapping[str, float],
                            cached: Sequence[str]) -> Published:
    """Summary and report of two models; `sweep` holds the tuned LoRA at further weights, the rest as for a run."""
    keys = {"evaluation": f"evaluations/{comparison.evaluation_id}", "target_images": images["target"].folder.key,
            "tuned_images": images["tuned"].folder.key}
    weights = {"lora_weights": [point.findings() for point in sweep]} if sweep else {}
    counts = {"evaluation_prompts": len(comparison.prompts), "images": images["target"].images + images["tuned"].images}
    return _write(
        run, images, comparison, seconds, cached, keys,
        {**weights, "target": run.config.target.source, "tuned": run.config.tuned}, counts=counts, sweep=sweep,
        title=f"{run.config.tuned} against {run.config.target.source}")


def _write(run: Run | ComparisonRun, images: Mapping[str, PoolPlan], comparison: Comparison,
           seconds: Mapping[str, float], cached: Sequence[str], keys: Mapping[str, str], summary: Mapping[str, Any],
           **fields: Any) -> Published:
    """Write page and summary. `keys` of artifacts, `summary` and `fields` of ReportData are specific to the caller."""
    scorer = next(iter(comparison.win_rates))
    gains, losses = extreme_positions(comparison, scorer, EXTREMES)

    def pairs(positions: list[int]) -> list[PairSample]:
        return sample_pairs(comparison, images["target"], images["tuned"], scorer, positions)

    all_keys = {"report": run.key("report.html"), "summary": run.key("summary.json"), **keys}
    artifacts = {name: run.store.url(key) for name, key in all_keys.items()}
    timings = _making_seconds(run, seconds, cached)
    studies = read_people(run.store, {f"evaluations/{comparison.evaluation_id}", keys.get("triplets", "")})
    data = ReportData(
        preset=run.config.preset, config=run.config, root=run.store.root, created_at=datetime.now(UTC),
        command=run.command, comparison=comparison, notes=_notes(run.config.evaluation.scorers), timings=timings,
        artifacts=artifacts, pairs=pairs(random_positions(comparison, PAIRS)), best_wins=pairs(gains),
        worst_losses=pairs(losses), people=studies, **fields)
    contents = {
        "preset": run.config.preset, "root": run.store.root, "run_id": run.run_id, **comparison.findings(),
        "evaluation_id": comparison.evaluation_id, "evaluation_prompts": len(comparison.prompts), **summary,
        "timings": timings, "found": list(cached), "artifacts": artifacts}
    if studies:
        contents["people"] = [{"study_id": one["study_id"], "win_rates": one["win_rates"]} for one in studies]
    run.store.write_bytes(run.key("report.html"), render_report(data).encode())
    run.store.write_json(run.key("summary.json"), contents)
    return Published(data, contents)


def _making_seconds(run: Run | ComparisonRun, seconds: Mapping[str, float], cached: Sequence[str]) -> dict[str, float]:
    """Seconds by stage; for a cached one those in which an earlier run of the same settings made it."""
    earlier: dict[str, float] = {}
    with suppress(StorageError):    # none yet, or not readable: this run's times are all there is
        earlier = run.store.read_object(run.key("summary.json"), timings=dict[str, float])["timings"]
    return {name: earlier.get(name, value) if name in cached else value for name, value in seconds.items()}


def _notes(scorers: Sequence[ScorerConfig]) -> list[str]:
    notes = [f"CLIP scores are from {scorer.source or OPENAI_CLIP}." for scorer in scorers if scorer.name == "clip"]
    if any(is_built_in(scorer.source) for scorer in scorers):
        notes.append(f"Where this page says PickScore, {SCORER_NOTE}.")
    return notes
