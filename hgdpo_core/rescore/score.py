"""Scoring and ranking of what a plan (hgdpo_core/rescore/plan.py) lists as missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from hgdpo_core.devices import default_device
from hgdpo_core.errors import CorruptShardError, InputError, ModelError
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.prompts import load_prompts, prompt_id
from hgdpo_core.rescore.plan import RankJob, RescorePlan, ScoreJob, Skipped, shards_of
from hgdpo_core.scorers import load_configured_scorer
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.dataset_card import card_licence
from hgdpo_core.stages.scores import ScoreStage, missing_scores, score_settings
from hgdpo_core.stages.triplets import TripletCounts, TripletStage, triplet_folder, write_dataset_card
from hgdpo_core.statistics.distributions import summarise_scores
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder


def score_missing(store: Store, jobs: Sequence[ScoreJob], *, device: str | None = None, progress: Progress = silent,
                  should_stop: ShouldStop = never_stop) -> list[Skipped]:
    """Score what the jobs of ONE scorer miss, loading it once and only if something is missing.

    Returns the skipped pools: the scorer may not support such prompts, and a shard of images that does not match its
    manifest goes to quarantine, until a run of that pool's prompts generates it again. ModelError when the scorer has
    changed since the plan.
    """
    images, scored = sum(job.images for job in jobs), 0
    if not images:
        return []
    device, version = device or default_device(), jobs[0].version
    loaded = load_configured_scorer(version.scorer, device)
    if loaded.fingerprint != version.fingerprint:
        raise ModelError(f"scorer {version.scorer.name} changed since the plan was made (fingerprint "
                         f"{version.fingerprint[:12]} then, {loaded.fingerprint[:12]} now): start again")
    skipped: list[Skipped] = []
    for job in jobs:
        stage = score_stage(store, job)

        def report(done: int, total: int, unit: str, before: int = scored) -> None:
            progress(before + done, images, unit)

        try:
            stage.make(Worker(device, report, should_stop, network=loaded), job.missing)
        except (CorruptShardError, InputError) as error:
            skipped.append(Skipped(what=f"pool {job.pool_id} by {version.scorer.name}", reason=str(error)))
        scored += job.images
    return skipped


def score_stage(store: Store, job: ScoreJob) -> ScoreStage:
    """One job as a stage of the whole pool, so that a second attempt cuts the same ranges as the first."""
    pool, version = ShardFolder.open(store, f"pools/{job.pool_id}"), job.version
    scores = ShardFolder.create(store, job.scores, score_settings(job.pool_id, version.scorer, version.fingerprint))
    return ScoreStage(pool, scores, version.scorer, tuple(pool.manifests()), f"{version.scorer.name}, {job.pool_id}")


@dataclass(frozen=True)
class Ranking:
    """The data set of triplets of a job, new or existing."""

    job: RankJob
    key: str
    counts: TripletCounts


def rank_again(store: Store, job: RankJob, *, progress: Progress = silent,
               should_stop: ShouldStop = never_stop) -> Ranking | Skipped:
    """The triplets of a list of prompts by the new scores, with a data set card; Skipped if scores are missing."""
    pool, scores = ShardFolder.open(store, f"pools/{job.pool_id}"), ShardFolder.open(store, job.scores)
    manifests = pool.manifests()
    indices = shards_of(store, manifests, job.prompts_id)
    what = f"triplets of prompts {job.prompts_id} from pool {job.pool_id}"
    missing = missing_scores(pool, scores, indices, pool_manifests=manifests)
    if missing:
        return Skipped(what=what, reason=f"{len(missing)} of its {len(indices)} shards have no scores")
    prompts = load_prompts(store, job.prompts_id)
    stage = TripletStage(pool, scores, triplet_folder(store, pool, scores, job.prompts_id, job.config),
                         frozenset(map(prompt_id, prompts.prompts)), job.config, tuple(indices))
    try:
        stage.make(Worker("cpu", progress, should_stop))
    except CorruptShardError as error:
        return Skipped(what=what, reason=str(error))
    write_dataset_card(stage, card_licence(store, job.replaces or stage.folder.key))
    return Ranking(job, stage.folder.key, stage.counts())


def summarise_pools(store: Store, plan: RescorePlan) -> list[dict[str, Any]]:
    """A row for every complete pool and scorer of a plan that has scores by now: images, mean, spread, ends."""
    rows = []
    for key, item in sorted({item.scores: item for item in (*plan.complete, *plan.jobs)}.items()):
        if not store.exists(f"{key}/config.json"):
            continue        # a pool that was skipped
        scores = ShardFolder.open(store, key)
        tables = [scores.read(index, ["score"]) for index in scores.manifests()]
        if tables:
            summary = summarise_scores(pa.concat_tables(tables)["score"].to_numpy())
            rows.append({"pool": item.pool_id, "scorer": item.version.scorer.name, "images": summary.n,
                         **{name: getattr(summary, name) for name in ("mean", "std", "min", "median", "max")}})
    return rows
