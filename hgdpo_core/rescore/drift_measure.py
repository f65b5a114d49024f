"""The drift of a rescore run, measured on the shards that it changed: pools, data sets, win rates.

Each function returns JSON values for `rescores/<name>/report.json`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hgdpo_core.errors import CorruptShardError
from hgdpo_core.metrics import WinRate, win_rate
from hgdpo_core.prompts import prompt_id
from hgdpo_core.rescore.drift import ranking_drift
from hgdpo_core.rescore.plan import ScoreJob, Skipped, read_configs
from hgdpo_core.rescore.score import Ranking
from hgdpo_core.stages.scores import missing_scores, read_scores, score_key, score_settings
from hgdpo_core.statistics.distributions import score_histogram, summarise_scores
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

WORST_PROMPTS = 8

Scores = dict[str, np.ndarray]
"""Prompt id -> float64 [N], its candidates in index order."""


def measure_pool(store: Store, job: ScoreJob, problems: list[Skipped]) -> dict[str, Any] | None:
    """The drift of one pool by one scorer; None when none of its shards has scores."""
    pool, scores = ShardFolder.open(store, f"pools/{job.pool_id}"), ShardFolder.open(store, job.scores)
    now = _read_scores(scores, job.compared, problems)
    if not now:
        return None
    before: Scores = {}
    if job.before is not None:
        old = ShardFolder.open(store, job.before)
        outdated = missing_scores(pool, old, [index for index in job.compared if index in pool.manifests()])
        before = _read_scores(old, [index for index in job.compared if index not in outdated], problems)
    common = [prompt for prompt in now if prompt in before and len(before[prompt]) == len(now[prompt])]
    made = scores.manifests()
    return {
        "pool_id": job.pool_id, "scorer": job.version.scorer.name, "scores": job.scores, "before": job.before,
        "images_scored": sum(made[index].rows for index in job.missing if index in made), "prompts": len(now),
        "prompts_compared": len(common), **_compare(pool, before, now, common)}


def _compare(pool: ShardFolder, before: Scores, now: Scores, common: list[str]) -> dict[str, Any]:
    """Rankings and distributions before and now; without prompts in `common` only the distribution now."""
    sides = (before, now) if common else (now,)
    values = [np.concatenate([side[prompt] for prompt in common or now]) for side in sides]
    edges, counts = score_histogram(*values)
    summaries = [asdict(summarise_scores(side)) for side in values]
    ranking, worst = None, []
    if common and len(now[common[0]]) > 1:
        drift = ranking_drift(*(np.stack([side[prompt] for prompt in common]) for side in (before, now)))
        ranking = drift.summary()
        rows = [row for row in np.argsort(drift.taus)[:WORST_PROMPTS] if drift.taus[row] < 1]
        texts = _read_prompts(pool, [common[row] for row in rows])
        worst = [{"prompt": texts[common[row]], "tau": float(drift.taus[row]), "winner": drift.winners[row].tolist(),
                  "loser": drift.losers[row].tolist()} for row in rows]
    return {"ranking": ranking, "worst_prompts": worst, "scores_before": summaries[0] if common else None,
            "scores_now": summaries[-1],
            "histogram": {"edges": edges, "before": counts[0] if common else None, "now": counts[-1]}}


def _read_scores(folder: ShardFolder, indices: Sequence[int], problems: list[Skipped]) -> Scores:
    """Scores of the existing shards; one that does not match its manifest is skipped and added to `problems`."""
    found: Scores = {}
    manifests = folder.manifests()
    for index in (index for index in indices if index in manifests):
        try:
            table = folder.read(index, manifest=manifests[index])
        except CorruptShardError as error:
            problems.append(Skipped(what=folder.key, reason=str(error)))
            continue
        for prompt, scores in read_scores(table).items():
            found[prompt] = np.array([scores[number] for number in sorted(scores)], dtype=np.float64)
    return found


def _read_prompts(pool: ShardFolder, ids: Sequence[str]) -> dict[str, str]:
    """The texts of a few prompts, without fetching images."""
    return {row["prompt_id"]: row["prompt"] for index, manifest in pool.manifests().items()
            if set(ids) & set(manifest.details["prompt_ids"])
            for row in pool.read_columns(index, ["prompt_id", "prompt"], manifest=manifest).to_pylist()}


def measure_ranking(store: Store, ranking: Ranking) -> dict[str, Any]:
    """Counts of a data set, and how many of its prompts have the same pair in the data set that it replaces."""
    now = _read_pairs(ShardFolder.open(store, ranking.key))
    replaces = ranking.job.replaces
    before = {} if replaces is None else _read_pairs(ShardFolder.open(store, replaces))
    both = now.keys() & before.keys()
    return {"triplets": ranking.key, "replaces": replaces, "scores": ranking.job.scores,
            "rows": ranking.counts.triplets, "rejected": ranking.counts.rejected,
            "prompts_compared": len(both), "same_pair": sum(now[prompt] == before[prompt] for prompt in both)}


def _read_pairs(triplets: ShardFolder) -> dict[str, tuple[int, int]]:
    """Prompt id -> indices of winner and loser."""
    columns = ["prompt_id", "winner_index", "loser_index"]
    return {row["prompt_id"]: (row["winner_index"], row["loser_index"])
            for index, manifest in triplets.manifests().items()
            for row in triplets.read_columns(index, columns, manifest=manifest).to_pylist()}


def measure_evaluations(store: Store, jobs: Sequence[ScoreJob]) -> Iterator[dict[str, Any]]:
    """Win rates before and now of the evaluations whose images were scored again; `evaluations/` is not changed."""
    scored = {(f"pools/{job.pool_id}", job.version.scorer.name) for job in jobs}
    versions = {job.version.scorer.name: job.version for job in jobs}
    for evaluation_id, config in read_configs(store, "evaluations").items():
        if config is None or not {"target", "tuned", "prompts", "scores"} <= config.keys():
            continue
        pools = [config["target"], config["tuned"]]
        for name, version in versions.items():
            if not any((pool, name) in scored for pool in pools):
                continue
            now = [score_key(score_settings(pool.split("/")[-1], version.scorer, version.fingerprint))
                   for pool in pools]
            before, rate = config["scores"].get(name), _win_rate(store, now, config["prompts"])
            if rate is not None and now != before:
                old = _win_rate(store, before, config["prompts"]) if before else None
                yield {"evaluation_id": evaluation_id, "scorer": name,
                       "before": None if old is None else old.as_dict(), "now": rate.as_dict()}


def _win_rate(store: Store, folders: Sequence[str], prompts: Sequence[str]) -> WinRate | None:
    """The tuned model over the target, from the score folders of target and tuned; None if a prompt has no score."""
    means = []
    for key in folders:
        if not store.exists(f"{key}/config.json"):
            return None
        folder = ShardFolder.open(store, key)
        scores = _read_scores(folder, list(folder.manifests()), [])
        if any(prompt_id(prompt) not in scores for prompt in prompts):
            return None
        means.append(np.array([scores[prompt_id(prompt)].mean() for prompt in prompts]))
    if not all(np.isfinite(values).all() for values in means):
        return None
    return win_rate(means[1], means[0])
