"""What a study found, as `results.json`, `results.md` and `votes.parquet` of its folder."""

from contextlib import suppress
from typing import Any

import pyarrow as pa

from hgdpo_core.errors import StorageError
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import read_table, write_table
from hgdpo_core.study.findings import HALF_WIDTH, StudyResults, evaluate_votes
from hgdpo_core.study.statistics import check_half_width
from hgdpo_core.study.study import PAIRS_NAME, open_study
from hgdpo_core.study.tables import results_markdown
from hgdpo_core.study.votes import STUDIES, read_votes

RESULTS, TEXT, ANSWERS = "results.json", "results.md", "votes.parquet"


def write_results(store: Store, study_id: str | None = None, *, half_width: float = HALF_WIDTH) -> StudyResults:
    """Evaluate a study, by default the root's only one, and write its results and its votes, one row an answer.

    Columns of `votes.parquet`: VOTES, and `left_out`, the reason why the win rates do not count the vote, or null.
    InputError for an unknown study, StorageError for votes that cannot be read or results that cannot be written.
    """
    check_half_width(half_width)  # before any vote is there too
    study = open_study(store, study_id)
    votes, pairs = read_votes(store, study.id), read_pairs(store, study.id)
    results, reasons = evaluate_votes(study.id, study.config.sources, votes.to_pylist(), pairs, half_width=half_width)
    table = votes.append_column("left_out", pa.array(reasons, pa.string()))
    write_table(store, f"{study.key}/{ANSWERS}", table)
    store.write_bytes(f"{study.key}/{TEXT}", results_markdown(results).encode())
    store.write_json(f"{study.key}/{RESULTS}", results.as_dict())
    return results


def read_half_width(store: Store, study_id: str) -> float:
    """The precision that was wanted of results that are there; the default where there are none, or not readable."""
    with suppress(StorageError):
        return store.read_object(f"{STUDIES}/{study_id}/{RESULTS}", half_width=float)["half_width"]
    return HALF_WIDTH


def read_pairs(store: Store, study_id: str) -> list[dict[str, Any]]:
    """The pairs of a study without their images; scores are dicts by judge."""
    columns = ["pair", "prompt_id", "first", "second", "first_scores", "second_scores"]
    rows = read_table(store, f"{STUDIES}/{study_id}/{PAIRS_NAME}", columns).to_pylist()
    return [{**row, **{name: dict(row[name] or ()) for name in columns[-2:]}} for row in rows]
