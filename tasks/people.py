"""User studies: made at the end of a run or by a run of their own; what people preferred, in the Prefect UI."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefect.logging import get_run_logger

from hgdpo_core.config.study import StudyConfig
from hgdpo_core.errors import InputError
from hgdpo_core.evaluate import Comparison
from hgdpo_core.progress import StageProgress, count_of
from hgdpo_core.report.people import preference, shown_rates
from hgdpo_core.storage import Store
from hgdpo_core.study.create import CreatedStudy, create_study
from tasks.options import stage_task
from tasks.ui import show_table, show_text

COLUMNS = ("model", "against", "rate", "ci_low", "ci_high", "wins", "losses", "ties", "people", "prompts")


@stage_task("make study")
def make_study(store: Store, config: StudyConfig, on: StageProgress) -> CreatedStudy:
    """The study of these settings; an artifact says how people are asked."""
    with on("study") as progress:
        created = create_study(store, config, progress)
    sentence = created.sentence
    refused = "".join(f"\n- refused: {count_of(number, 'pair')}: {reason}"
                      for reason, number in sorted(created.refused.items()))
    show_text("study", f"{sentence}\n\n    {created.study.serve_command}\n{refused}", "A study that waits for people")
    get_run_logger().info("%s: %s", sentence, created.study.serve_command)
    return created


def make_study_of(store: Store, comparison: Comparison, pairs: int, on: StageProgress) -> None:
    """A study of an evaluation's two models. Where none of their images can be compared, a warning says so."""
    try:
        make_study(store, StudyConfig(sources=(f"evaluations/{comparison.evaluation_id}",), pairs=pairs), on)
    except InputError as error:  # the run's own result does not depend on it
        get_run_logger().warning("no study was made: %s", error)


def show_people(studies: Sequence[Mapping[str, Any]]) -> None:
    """The win rates of each study as a table, under a sentence that says what people preferred.

    `studies`: contents of `results.json`; without votes there is nothing to show.
    """
    for results in studies:
        rates = shown_rates(results)
        if rates:
            rows = [{name: rate[name] for name in COLUMNS} for rate in rates]
            show_table(f"people {results['study_id']}", rows, ". ".join(map(preference, rates)))
