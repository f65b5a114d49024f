"""What a study holds: pairs of images that are compared, and votes, as tables.

`studies/<id>/config.json` has the settings, `pairs.parquet` the pairs, `participants/` a file for each participant,
`votes/` one file for each participant and server. No row holds a name or an address. A vote counts only while its
participant's file exists: deleting that is the first step of deleting their votes, and it stops a running server.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pyarrow as pa

from hgdpo_core.storage import PARALLEL_REQUESTS, MissingKeyError, Store
from hgdpo_core.storage.shards import read_table

STUDIES = "studies"

Choice = Literal["left", "right", "tie"]
Kind = Literal["question", "repeat", "check"]
"""A pair; one that this participant has seen before, with its sides swapped; a pair with an obvious answer."""

PAIRS = pa.schema([
    ("pair", pa.string()),  # unguessable, and says nothing about its models
    ("prompt_id", pa.string()), ("prompt", pa.string()),
    ("first", pa.string()), ("second", pa.string()),  # names of the models: target and tuned, or winner and loser
    ("first_image", pa.binary()), ("second_image", pa.binary()),
    ("first_scores", pa.map_(pa.string(), pa.float64())), ("second_scores", pa.map_(pa.string(), pa.float64())),
])
"""`..._scores`: by name of the judge, where the source has scores."""

VOTES = pa.schema([
    ("trial", pa.string()), ("pair", pa.string()), ("prompt_id", pa.string()),
    ("left", pa.string()), ("right", pa.string()),  # names of the models; of a check, "picture" and "noise"
    ("choice", pa.string()), ("kind", pa.string()),
    ("participant", pa.string()),  # a hash of the participant's code
    ("shown_at", pa.timestamp("us", tz="UTC")), ("ms", pa.int32()),
])


def participant_of(study_id: str, code: str) -> str:
    """What stands for a participant in votes and file names: a hash of the code that only the participant has."""
    return hashlib.sha256(f"{study_id}/{code}".encode()).hexdigest()[:32]


def participant_key(study_id: str, participant: str) -> str:
    """The file that says that a participant exists."""
    return f"{STUDIES}/{study_id}/participants/{participant}.json"


def list_participants(store: Store, study_id: str) -> list[str]:
    """All participants of a study, sorted, those without votes among them."""
    names = store.list(f"{STUDIES}/{study_id}/participants")
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def vote_keys(store: Store, study_id: str, participant: str) -> list[str]:
    """The files of one participant's votes."""
    folder = f"{STUDIES}/{study_id}/votes"
    return [f"{folder}/{name}" for name in sorted(store.list(folder)) if name.startswith(f"{participant}-")]


def delete_participant(store: Store, study_id: str, participant: str) -> int:
    """Delete a participant and all votes of theirs; returns how many files of votes there were.

    A running server notices within seconds, and deletes what it holds of them too.
    """
    store.delete(participant_key(study_id, participant))
    keys = vote_keys(store, study_id, participant)
    for key in keys:
        store.delete(key)
    return len(keys)


def read_votes(store: Store, study_id: str) -> pa.Table:
    """The votes of all participants, columns VOTES: one row for each trial that was answered, its last answer.

    Rows are in the order of participants and of their answers. What a running server holds arrives within seconds.
    """
    folder, known = f"{STUDIES}/{study_id}/votes", set(list_participants(store, study_id))
    keys = [f"{folder}/{name}" for name in store.list(folder)
            if name.endswith(".parquet") and name.partition("-")[0] in known]
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        rows = [row for table in pool.map(lambda key: _read(store, key), keys) for row in table.to_pylist()]
    return pa.Table.from_pylist(latest(rows), schema=VOTES)


def latest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last answer to each trial, by participant and time: two servers may have stored the same trial."""
    ordered = sorted(rows, key=lambda row: (row["participant"], row["shown_at"], row["ms"]))
    return list({(row["participant"], row["trial"]): row for row in ordered}.values())


def _read(store: Store, key: str) -> pa.Table:
    try:
        return read_table(store, key, VOTES.names)
    except MissingKeyError:  # deleted since it was listed
        return VOTES.empty_table()
