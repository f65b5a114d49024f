"""One night of scoring again, on record: `rescores/<night>/` with its plan before and its drift report after the work.

The name is the time of its start, so no night writes over another, and a night without `report.json` is not
finished: the next one takes it over.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from hgdpo_core import __version__
from hgdpo_core.config import StageConfig
from hgdpo_core.rescore.drift_measure import measure_evaluations, measure_pool, measure_ranking
from hgdpo_core.rescore.drift_report import render_html, render_markdown
from hgdpo_core.rescore.plan import RankJob, RescorePlan, ScoreJob, Skipped
from hgdpo_core.rescore.score import Ranking
from hgdpo_core.storage import MissingKeyError, Store


class Night(StageConfig):
    """What a night set out to do; `config.json` of its folder."""

    name: str
    root: str
    code_version: str
    started_at: str
    jobs: tuple[ScoreJob, ...]
    rankings: tuple[RankJob, ...]

    def key(self, name: str) -> str:
        """Key of a file of this night, for example `rescores/<night>/report.json`."""
        return f"rescores/{self.name}/{name}"


def open_night(store: Store, plan: RescorePlan, *, now: datetime | None = None) -> Night | None:
    """The night that does the plan: a new one, or the latest if it is not finished; None when nothing is to be done.

    What an unfinished night has done already stays in its report, as long as it is wanted still.
    """
    begun = find_unfinished(store)
    if begun is None and plan.nothing_to_do:
        return None
    now = now or datetime.now(UTC)
    if begun is None:
        name = _free_name(now.strftime("%Y-%m-%dT%H%M%SZ"), store.list_folders("rescores"))
        night = Night(name=name, root=store.root, code_version=__version__, jobs=plan.jobs, rankings=plan.rankings,
                      started_at=now.isoformat(timespec="seconds"))
    else:
        night = _continue(begun, plan)
    store.write_json(night.key("config.json"), night.model_dump(mode="json"))
    return night


def last_report(store: Store) -> str | None:
    """Key of the latest finished night's report, `rescores/<night>/report.html`."""
    for name in reversed(store.list_folders("rescores")):
        if store.exists(f"rescores/{name}/report.json"):
            return f"rescores/{name}/report.html"
    return None


def _free_name(name: str, taken: Sequence[str]) -> str:
    number = 1
    while (candidate := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return candidate


def find_unfinished(store: Store) -> Night | None:
    """The latest night, if it has no report yet; it was killed, or is at work now."""
    names = store.list_folders("rescores")
    if not names or store.exists(f"rescores/{names[-1]}/report.json"):
        return None
    try:
        return Night.model_validate_json(store.read_bytes(f"rescores/{names[-1]}/config.json"))
    except (MissingKeyError, ValidationError):
        return None             # nothing of it is known: whatever it scored is found, only its report is lost


def _continue(begun: Night, plan: RescorePlan) -> Night:
    wanted = {found.scores for found in plan.found} | {job.scores for job in plan.jobs}
    jobs = {job.scores: job for job in plan.jobs}
    for job in begun.jobs:
        if job.scores in wanted:
            more = jobs.get(job.scores, job)
            jobs[job.scores] = job.model_copy(update={
                name: tuple(sorted({*getattr(job, name), *getattr(more, name)})) for name in ("missing", "compared")})
    rankings = {(job.scores, job.prompts_id, job.config): job
                for job in (*plan.rankings, *begun.rankings) if job.scores in wanted}
    return begun.model_copy(update={"jobs": tuple(jobs.values()), "rankings": tuple(rankings.values())})


def close_night(store: Store, night: Night, rankings: Sequence[Ranking], skipped: Sequence[Skipped]) -> dict[str, Any]:
    """Measure the drift and write `report.md`, `report.html` and, last, `report.json`; returns the latter."""
    problems = list(skipped)
    pools = [measured for job in night.jobs if (measured := measure_pool(store, job, problems)) is not None]
    versions = {job.version.scorer.name: job.version for job in night.jobs}
    report = {
        "night": night.name, "root": night.root, "started_at": night.started_at,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"), "code_version": __version__,
        "scorers": [{"name": name, "source": version.scorer.source, "dtype": version.scorer.dtype,
                     "fingerprint": version.fingerprint} for name, version in sorted(versions.items())],
        "pools": pools, "triplets": [measure_ranking(store, ranking) for ranking in rankings],
        "evaluations": list(measure_evaluations(store, night.jobs)),
        "skipped": [item.model_dump() for item in problems]}
    store.write_bytes(night.key("report.md"), render_markdown(report).encode())
    store.write_bytes(night.key("report.html"), render_html(report).encode())
    store.write_json(night.key("report.json"), report)
    return report
