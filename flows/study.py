"""Make a user study of results in the root; `hgdpo study serve` then asks people. Show what they preferred."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows import parameters as p
from flows.lifecycle import name_this_run, refuse_relative_paths
from flows.terminal import open_store
from hgdpo_core.config.base import validate
from hgdpo_core.config.study import StudyConfig
from tasks.people import make_study, show_people
from tasks.ui import explain_own_errors, stage_progress


@flow(name="hgdpo-study")
def hgdpo_study(
    sources: list[str] = p.STUDY_SOURCES.field(),
    root: str | None = p.STUDY_ROOT.field(),
    pairs: int = p.PAIRS_ASKED.field(),
    people: int = p.PEOPLE.field(),
    questions: int = p.QUESTIONS.field(),
    repeats: float = p.REPEATS.field(),
    checks: float = p.CHECKS.field(),
    forced_choice: bool = p.FORCED_CHOICE.field(),
    question: str = p.QUESTION.field(),
    seed: int = p.STUDY_SEED.field(),
) -> State[dict[str, Any]]:
    """Make a study, or find it; returns its id, pairs, people and the command that asks them."""
    explain_own_errors()
    refuse_relative_paths(root=root)
    config = validate(StudyConfig, {
        "sources": tuple(sources), "pairs": pairs, "people": people, "questions": questions, "repeats": repeats,
        "checks": checks, "forced_choice": forced_choice, "question": question, "seed": seed})
    created = make_study(open_store(root), config, stage_progress)
    name_this_run(created.study.id)
    return Completed(message=created.sentence, data={
        "study_id": created.study.id, "pairs": len(created.study.pairs), "people": created.study.people,
        "questions_each": created.study.trials_each, "refused": created.refused,
        "command": created.study.serve_command})


@flow(name="hgdpo-study-results")
def show_study_results(results: dict[str, Any]) -> None:
    """The win rates of a study as an artifact; `results`: contents of `results.json`."""
    name_this_run(results["study_id"])
    show_people([results])
