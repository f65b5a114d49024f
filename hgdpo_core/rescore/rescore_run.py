"""The record of a rescore run: `rescores/<name>/` with its plan before the work and its drift report after it.

The name is the start time, so that no run overwrites another. A run without `report.json` is unfinished, and the next
one continues it.
"""

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from hgdpo_core import __version__
from hgdpo_core.config.base import StageConfig
from hgdpo_core.rescore.drift_measure import measure_evaluations, measure_pool, measure_ranking
from hgdpo_core.rescore.drift_report import render_html, render_markdown
from hgdpo_core.rescore.plan import RankJob, RescorePlan, ScoreJob, Skipped
from hgdpo_core.rescore.score import Ranking
from hgdpo_core.storage import MissingKeyError, Store


class RescoreRun(StageConfig):
    """The plan of a rescore run; `config.json` of its folder."""

    name: str
    root: str
    code_version: str
    started_at: str
    jobs: tuple[ScoreJob, ...]
    rankings: tuple[RankJob, ...]

    def key(self, name: str) -> str:
        """Key of a file of this run, for example `rescores/<name>/report.json`."""
        return f"rescores/{self.name}/{name}"


def open_rescore_run(store: Store, plan: RescorePlan, *, now: datetime | None = None) -> RescoreRun | None:
    """The run of a plan: a new one, or the latest if it is unfinished; None when there is nothing to do.

    What an unfinished run has done already stays in its report, as long as it is still requested.
    """
    run = find_unfinished(store)
    if run is not None:
        run = _continue(run, plan)
    elif plan.nothing_to_do:
        return None
    else:
        now = now or datetime.now(UTC)
        start, taken = now.strftime("%Y-%m-%dT%H%M%SZ"), store.list_folders("rescores")
        names = itertools.chain([start], (f"{start}-{number}" for number in itertools.count(2)))
        run = RescoreRun(
            name=next(name for name in names if name not in taken), root=store.root, code_version=__version__,
            jobs=plan.jobs, rankings=plan.rankings, started_at=now.isoformat(timespec="seconds"))
    store.write_json(run.key("config.json"), run.model_dump(mode="json"))
    return run


def last_report(store: Store) -> str | None:
    """Key of the latest finished run's report, `rescores/<name>/report.html`."""
    for name in reversed(store.list_folders("rescores")):
        if store.exists(f"rescores/{name}/report.json"):
            return f"rescores/{name}/report.html"
    return None


def find_unfinished(store: Store) -> RescoreRun | None:
    """The latest run, if it has no report yet: it was killed, or is running now."""
    names = store.list_folders("rescores")
    if not names or store.exists(f"rescores/{names[-1]}/report.json"):
        return None
    try:
        return RescoreRun.model_validate_json(store.read_bytes(f"rescores/{names[-1]}/config.json"))
    except (MissingKeyError, ValidationError):
        return None             # its plan is unknown: its scores are kept, only its report is lost


def _continue(run: RescoreRun, plan: RescorePlan) -> RescoreRun:
    requested = {item.scores for item in (*plan.complete, *plan.jobs)}
    jobs = {job.scores: job for job in plan.jobs}
    for job in run.jobs:
        if job.scores in requested:
            more = jobs.get(job.scores, job)
            jobs[job.scores] = job.model_copy(update={
                name: tuple(sorted({*getattr(job, name), *getattr(more, name)})) for name in ("missing", "compared")})
    rankings = {(job.scores, job.prompts_id, job.config): job
                for job in (*plan.rankings, *run.rankings) if job.scores in requested}
    return run.model_copy(update={"jobs": tuple(jobs.values()), "rankings": tuple(rankings.values())})


def close_rescore_run(store: Store, run: RescoreRun, rankings: Sequence[Ranking],
                      skipped: Sequence[Skipped]) -> dict[str, Any]:
    """Measure the drift and write `report.md`, `report.html` and, last, `report.json`; returns the latter."""
    problems = list(skipped)
    pools = [measured for job in run.jobs if (measured := measure_pool(store, job, problems)) is not None]
    versions = {job.version.scorer.name: job.version for job in run.jobs}
    report = {
        "night": run.name, "root": run.root, "started_at": run.started_at,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"), "code_version": __version__,
        "scorers": [{"name": name, "source": version.scorer.source, "dtype": version.scorer.dtype,
                     "fingerprint": version.fingerprint} for name, version in sorted(versions.items())],
        "pools": pools, "triplets": [measure_ranking(store, ranking) for ranking in rankings],
        "evaluations": list(measure_evaluations(store, run.jobs)),
        "skipped": [item.model_dump() for item in problems]}
    store.write_bytes(run.key("report.md"), render_markdown(report).encode())
    store.write_bytes(run.key("report.html"), render_html(report).encode())
    store.write_json(run.key("report.json"), report)
    return report
