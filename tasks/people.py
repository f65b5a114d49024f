"""What people preferred, in the Prefect UI."""

from collections.abc import Mapping, Sequence
from typing import Any

from hgdpo_core.report.people import preference, shown_rates
from tasks.ui import show_table

COLUMNS = ("model", "against", "rate", "ci_low", "ci_high", "wins", "losses", "ties", "people", "prompts")


def show_people(studies: Sequence[Mapping[str, Any]]) -> None:
    """The win rates of each study as a table, under a sentence that says what people preferred.

    `studies`: contents of `results.json`; without votes there is nothing to show.
    """
    for results in studies:
        rates = shown_rates(results)
        if rates:
            rows = [{name: rate[name] for name in COLUMNS} for rate in rates]
            show_table(f"people {results['study_id']}", rows, ". ".join(map(preference, rates)))
