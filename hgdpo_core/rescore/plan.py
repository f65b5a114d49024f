"""The plan of a rescore run: pools whose scores are missing or by a scorer that changed, and rankings by such scores.

Every complete pool of a root is considered. Evaluation images are pools too, those that an
`evaluations/<id>/config.json` names: they have one image per prompt, and win rates by the current scorer need their
scores. A scorer that a run only evaluates with scores these alone. Pools are never written. A ranking by other scores
is a data set with another id beside the old one, and no training is started.

The record of a run is `rescores/<name>/`, with `config.json` before the work and `report.json` after it
(hgdpo_core/rescore/rescore_run.py): a run that was killed is continued by the next one.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hgdpo_core.config import TripletConfig
from hgdpo_core.config.base import StageConfig
from hgdpo_core.errors import ConfigError, CorruptShardError, ModelError
from hgdpo_core.prompts import load_prompts, prompt_id
from hgdpo_core.rescore.requested import RequestedScorer, requested_scorers
from hgdpo_core.scorers import find_scorer
from hgdpo_core.stages.located_scorer import scorer_version
from hgdpo_core.stages.scores import missing_scores, score_key, score_settings
from hgdpo_core.storage import MissingKeyError, Store
from hgdpo_core.storage.shards import EXPECTED, ShardFolder, ShardManifest


class ScorerVersion(RequestedScorer):
    """A requested scorer with the version of its weights."""

    fingerprint: str


class PoolScores(StageConfig):
    """The scores of a pool by a scorer; `scores` is their folder."""

    pool_id: str
    version: ScorerVersion
    scores: str


class ScoreJob(PoolScores):
    """One pool by one scorer.

    `missing`: the pool's shards to score. `compared`: the shards that are reported on; more than the missing ones where
    only the ranking is missing. `before`: folder of the latest earlier scores of this pool by another version of the
    same scorer.
    """

    missing: tuple[int, ...]
    compared: tuple[int, ...]
    images: int
    before: str | None


class RankJob(StageConfig):
    """The data set of triplets of a pool, its new scores and a list of prompts.

    `replaces`: the data set of the same pool and prompts by the earlier scores, if there is one. It is kept.
    """

    pool_id: str
    scores: str
    prompts_id: str
    config: TripletConfig
    replaces: str | None


class Skipped(StageConfig):
    """What was skipped, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class RescorePlan:
    """The work under one root, what is skipped, and which scores are complete."""

    jobs: tuple[ScoreJob, ...]
    rankings: tuple[RankJob, ...]
    skipped: tuple[Skipped, ...]
    complete: tuple[PoolScores, ...]

    @property
    def nothing_to_do(self) -> bool:
        """Whether every requested score and ranking exists."""
        return not (self.jobs or self.rankings)

    def describe(self) -> str:
        """The work in one line."""
        complete = f"complete sets of scores found: {len(self.complete):,}"
        skipped = f"; skipped: {len(self.skipped):,}" if self.skipped else ""
        if self.nothing_to_do:
            return f"nothing to do; {complete}{skipped}"
        images, pools = sum(job.images for job in self.jobs), len({job.pool_id for job in self.jobs if job.missing})
        return (f"images to score: {images:,} (pools: {pools:,}); data sets of triplets to rank: "
                f"{len(self.rankings):,}; {complete}{skipped}")

    def rows(self) -> list[dict[str, Any]]:
        """A row for every pool and scorer with work."""
        return [{"pool": job.pool_id, "scorer": job.version.scorer.name, "version": job.version.fingerprint[:12],
                 "images": job.images, "shards": len(job.missing),
                 "rankings": sum(ranking.scores == job.scores for ranking in self.rankings), "before": job.before}
                for job in self.jobs]

    def by_version(self) -> list[tuple[ScorerVersion, list[ScoreJob]]]:
        """The jobs with missing scores, grouped by scorer, so that each scorer is loaded once."""
        versions: dict[ScorerVersion, list[ScoreJob]] = {}
        for job in self.jobs:
            if job.missing:
                versions.setdefault(job.version, []).append(job)
        return list(versions.items())


def find_versions(requested: Sequence[RequestedScorer], *, required: bool) -> tuple[list[ScorerVersion], list[Skipped]]:
    """The versions of the available scorers, without loading them.

    ModelError for a scorer whose weights are gone if it is `required`, or if no scorer is available.
    """
    versions: list[ScorerVersion] = []
    skipped: list[Skipped] = []
    problem: ModelError | None = None
    for item in requested:
        try:
            fingerprint = find_scorer(item.scorer.name, item.scorer.source)
            versions.append(ScorerVersion(scorer=item.scorer, pools=item.pools, fingerprint=fingerprint))
        except ModelError as error:
            problem = error
            skipped.append(Skipped(what=f"scorer {item.scorer.name}", reason=str(error)))
    if problem is not None and (required or not versions):
        raise problem
    return versions, skipped


def plan_requested(store: Store, names: Sequence[str] = (), *, preset: str | None = None,
                overrides: Mapping[str, Any] | None = None, verify: bool = False) -> RescorePlan:
    """`plan_rescore` for the scorers that `requested_scorers` finds.

    ModelError for a named scorer that is not available; one that only an old run uses is skipped and reported.
    """
    requested = requested_scorers(store, names=names, preset=preset, overrides=overrides)
    versions, gone = find_versions(requested, required=bool(names or preset))
    plan = plan_rescore(store, versions, verify=verify)
    return replace(plan, skipped=(*gone, *plan.skipped))


def plan_root(root: str, names: Sequence[str] = (), **settings: Any) -> RescorePlan:
    """`plan_requested` of the store at a root."""
    return plan_requested(Store(root), names, **settings)


def plan_rescore(store: Store, versions: Sequence[ScorerVersion], *, verify: bool = False) -> RescorePlan:
    """Plan every pool under the root; reads folder lists and manifests, never images or models.

    With `verify` every requested score is read: a shard of scores that does not match its manifest goes to quarantine
    and counts as missing. ConfigError when there are pools but no scorer.
    """
    planner = _Planner(store, versions, verify)
    pools = store.list_folders("pools")
    if pools and not versions:
        raise ConfigError(f"{store.root} holds pools, but no run that names scorers: name a scorer or a preset")
    for pool_id, config in read_configs(store, "pools", pools).items():
        planner.plan_pool(pool_id, config)
    return RescorePlan(tuple(planner.jobs), tuple(planner.rankings), tuple(planner.skipped), tuple(planner.complete))


def read_configs(store: Store, folder: str, names: Iterable[str] | None = None) -> dict[str, dict[str, Any] | None]:
    """Name -> `config.json` of each subfolder, read many at a time; None if it is missing or unreadable."""
    keys = {name: f"{folder}/{name}/config.json" for name in (store.list_folders(folder) if names is None else names)}
    texts = store.read_many(keys.values())
    return {name: _parse(texts.get(key, b"")) for name, key in keys.items()}


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        config = json.loads(text)
    except ValueError:
        return None
    return config if isinstance(config, dict) else None


class _Planner:
    """Collects the plan, pool by pool."""

    def __init__(self, store: Store, versions: Sequence[ScorerVersion], verify: bool):
        self.store, self.versions, self.verify = store, versions, verify
        self.jobs: list[ScoreJob] = []
        self.rankings: list[RankJob] = []
        self.skipped: list[Skipped] = []
        self.complete: list[PoolScores] = []
        self.triplets = {f"triplets/{name}": config for name, config in read_configs(store, "triplets").items()
                         if config is not None and {"pool", "scores", "prompts_id"} <= config.keys()}
        self.ranked = {config["pool"] for config in self.triplets.values()}
        self.evaluated = {config.get(side) for config in read_configs(store, "evaluations").values() if config
                          for side in ("target", "tuned")}

    def plan_pool(self, pool_id: str, config: dict[str, Any] | None) -> None:
        """Add the work on a pool for every scorer, or the reason why it is skipped."""
        expected = (config or {}).get(EXPECTED)
        if config is None or not isinstance(expected, dict):
            self._skip(pool_id, "its config.json is missing, unreadable or does not say how many shards it should have")
            return
        pool = ShardFolder(self.store, f"pools/{pool_id}", config)
        manifests = pool.manifests()
        rows = sum(manifest.rows for manifest in manifests.values())
        if len(manifests) < expected["shards"] or rows < expected["rows"]:
            self._skip(pool_id, f"incomplete: {len(manifests)} of {expected['shards']} shards, {rows} of "
                                f"{expected['rows']} images")
            return
        folders = self.store.list_folders(f"scores/{pool_id}")
        for version in self.versions:
            if not self._is_for(version, pool.key):
                continue
            if config.get("race") and config["race_scorer"] != scorer_version(version.scorer, version.fingerprint):
                self._skip(pool_id, f"its images were chosen by another scorer's race, not by {version.scorer.name}'s")
                continue
            self._plan_scores(pool, manifests, version, folders)

    def _is_for(self, version: ScorerVersion, pool_key: str) -> bool:
        if version.pools == "evaluation":
            return pool_key in self.evaluated
        return version.pools == "all" or pool_key in self.ranked or pool_key not in self.evaluated

    def _plan_scores(self, pool: ShardFolder, manifests: Mapping[int, ShardManifest], version: ScorerVersion,
                     folders: Sequence[str]) -> None:
        pool_id = pool.key.split("/")[-1]
        settings = score_settings(pool_id, version.scorer, version.fingerprint)
        scores = ShardFolder(self.store, score_key(settings), settings)
        scored = scores.manifests() if scores.key.split("/")[-1] in folders else {}
        if self.verify:
            scored = {index: manifest for index, manifest in scored.items() if self._is_intact(scores, manifest)}
        missing = missing_scores(pool, scores, list(manifests), pool_manifests=manifests, score_manifests=scored)
        rankings = list(self._stale_rankings(pool, manifests, scores, scored, missing))
        if not missing:
            self.complete.append(PoolScores(pool_id=pool_id, version=version, scores=scores.key))
        if not missing and not rankings:
            return
        before = self._scores_before(pool, manifests, scores.key, folders)
        self.jobs.append(ScoreJob(
            pool_id=pool_id, version=version, scores=scores.key, missing=tuple(missing), before=before,
            compared=tuple(missing or manifests), images=sum(manifests[index].rows for index in missing)))
        self.rankings += [RankJob(pool_id=pool_id, scores=scores.key, prompts_id=prompts_id, config=config,
                                  replaces=data_sets.get(before) if before else None)
                          for prompts_id, config, data_sets in rankings]

    def _is_intact(self, scores: ShardFolder, manifest: ShardManifest) -> bool:
        try:
            scores.read(manifest.index, manifest=manifest)
        except CorruptShardError:
            return False
        return True

    def _stale_rankings(self, pool: ShardFolder, manifests: Mapping[int, ShardManifest], scores: ShardFolder,
                        scored: Mapping[int, ShardManifest], missing: Sequence[int]
                        ) -> Iterator[tuple[str, TripletConfig, dict[str, str]]]:
        """(prompts id, settings, scores -> data set) of the rankings that are missing for these scores."""
        groups: dict[tuple[str, TripletConfig], dict[str, str]] = {}
        for key, config in self.triplets.items():
            if config["pool"] == pool.key and _scorer_name(config["scores"]) == _scorer_name(scores.key):
                group = (config["prompts_id"], TripletConfig.from_identity(config))
                groups.setdefault(group, {}).setdefault(config["scores"], key)
        for (prompts_id, config), data_sets in groups.items():
            try:
                indices = shards_of(self.store, manifests, prompts_id)
            except MissingKeyError as error:
                self._skip(pool.key.split("/")[-1], f"not ranked again, its list of prompts is gone: {error}")
                continue
            current = data_sets.get(scores.key)
            made = {} if current is None else ShardFolder.open(self.store, current).manifests()
            if set(indices) & set(missing) or any(
                    index not in made or made[index].inputs != (pool.input_shard(index, manifest=manifests[index]),
                                                                scores.input_shard(index, manifest=scored[index]))
                    for index in indices):
                yield prompts_id, config, data_sets

    def _scores_before(self, pool: ShardFolder, manifests: Mapping[int, ShardManifest], key: str,
                       folders: Sequence[str]) -> str | None:
        """Other scores of this pool by the same scorer: the latest complete ones, else the latest."""
        candidates = []
        for name in folders:
            folder = f"scores/{pool.key.split('/')[-1]}/{name}"
            if folder == key or _scorer_name(folder) != _scorer_name(key):
                continue
            scores = ShardFolder.open(self.store, folder)
            made = scores.manifests()
            missing = missing_scores(pool, scores, list(manifests), pool_manifests=manifests, score_manifests=made)
            if len(missing) < len(manifests):
                candidates.append((not missing, max(manifest.created_at for manifest in made.values()), folder))
        return max(candidates)[2] if candidates else None

    def _skip(self, pool_id: str, reason: str) -> None:
        self.skipped.append(Skipped(what=f"pool {pool_id}", reason=reason))


def _scorer_name(scores_key: str) -> str:
    return scores_key.split("/")[-1].rpartition("-")[0]


def shards_of(store: Store, manifests: Mapping[int, ShardManifest], prompts_id: str) -> list[int]:
    """The shards of a pool that hold a prompt of the list; MissingKeyError when the list is gone."""
    ids = {prompt_id(prompt) for prompt in load_prompts(store, prompts_id).prompts}
    return [index for index, manifest in manifests.items() if ids & set(manifest.details["prompt_ids"])]
