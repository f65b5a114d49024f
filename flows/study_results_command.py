"""`hgdpo study results` and `hgdpo study forget`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from flows.terminal import open_store
from hgdpo_core.errors import ConfigError
from hgdpo_core.progress import count_of

if TYPE_CHECKING:
    from hgdpo_core.study.findings import StudyResults


def study_results(options: argparse.Namespace) -> int:
    """Evaluate the answers of a study: win rates with intervals, agreement, judges beside people."""
    if options.artifact:
        _check_server()
    from hgdpo_core.study.results import ANSWERS, RESULTS, TEXT, write_results
    from hgdpo_core.study.tables import results_text

    store = open_store(options.root)
    results = write_results(store, options.study, half_width=options.half_width / 100)
    if options.artifact:
        _show(results)
    if options.json:
        print(json.dumps(results.as_dict(), indent=1, ensure_ascii=False))
        return 0
    print(f"Study {results.study_id}: {results_text(results)}\n")
    for name in (RESULTS, TEXT, ANSWERS):
        print(store.url(f"studies/{results.study_id}/{name}"))
    print("The report of the study's run has these numbers once the same command has run again")
    return 0


def study_forget(options: argparse.Namespace) -> int:
    """Delete all answers of one participant from a study."""
    from hgdpo_core.study.forget import forget_participant

    done = forget_participant(open_store(options.root), options.study, options.participant,
                              log=Path(options.log) if options.log else None)
    print(f"Deleted {count_of(done.votes, 'answer')} of participant {done.participant}")
    if done.rewritten:
        print("The study's results are written again without them")
    return 0


def _check_server() -> None:
    from prefect.settings import get_current_settings

    if not get_current_settings().api.url:
        raise ConfigError("--artifact shows the win rates on a Prefect server, but none is configured: start one with "
                          "`make up` and set PREFECT_API_URL to its address, or leave --artifact out")


def _show(results: "StudyResults") -> None:
    from flows.server import call_flow
    from flows.study import show_study_results

    call_flow(show_study_results, results=results.as_dict())
