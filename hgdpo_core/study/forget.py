"""Deleting one participant's answers from a study: everywhere below `studies/<id>`, and from this machine's log."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgdpo_core.errors import InputError
from hgdpo_core.progress import count_of
from hgdpo_core.storage import Store
from hgdpo_core.storage.local import write_atomically
from hgdpo_core.storage.shards import read_table
from hgdpo_core.study.log import read_segments, segments
from hgdpo_core.study.results import ANSWERS, RESULTS, TEXT, read_half_width, write_results
from hgdpo_core.study.study import Study, log_folder, open_study
from hgdpo_core.study.votes import delete_participant, list_participants, participant_of, vote_keys


@dataclass(frozen=True)
class Forgotten:
    """What was deleted of a participant."""

    participant: str
    """The hash that stood for them."""
    votes: int
    rewritten: bool
    """Whether results that had counted them were written again, without them."""


def forget_participant(store: Store, study_id: str | None, who: str, *, log: Path | None = None) -> Forgotten:
    """Delete all votes of a participant, given by their code (that of their link) or its hash.

    Results that were written before are written again without them. A running server deletes what it holds within
    seconds. `log`: the folder of the server's log, where it is not the usual one. InputError for an unknown
    participant.
    """
    study = open_study(store, study_id)
    participant = _find(study, who)
    folder = log or log_folder(study)
    trials = _stored_trials(store, study.id, participant) | _logged_trials(folder, participant)
    delete_participant(store, study.id, participant)
    _clean_log(folder, participant)
    rewritten = any(store.exists(f"{study.key}/{name}") for name in (RESULTS, TEXT, ANSWERS))
    if rewritten:
        write_results(store, study.id, half_width=read_half_width(store, study.id))
    return Forgotten(participant, len(trials), rewritten)


def _find(study: Study, who: str) -> str:
    """The hash of a participant of the study, or of one whose votes a broken-off deletion left behind."""
    known = {*list_participants(study.store, study.id),
             *(name.partition("-")[0] for name in study.store.list(f"{study.key}/votes"))}
    who = who.strip().rpartition("#")[2]
    for name in (who, participant_of(study.id, who)):
        if name in known:
            return name
    raise InputError(f"none of the {count_of(len(known), 'participant')} of {study.id} has this code or hash: give "
                     "the code at the end of the participant's link, or the hash of the column `participant`; where "
                     "the participant has withdrawn on the page, everything is deleted already")


def _stored_trials(store: Store, study_id: str, participant: str) -> set[str]:
    return {trial for key in vote_keys(store, study_id, participant)
            for trial in read_table(store, key, ["trial"])["trial"].to_pylist()}


def _logged_trials(folder: Path, participant: str) -> set[str]:
    return {row["trial"] for row in read_segments(segments(folder)) if row["participant"] == participant}


def _clean_log(folder: Path, participant: str) -> None:
    """Take a participant's records out of the log, unless a server has it open: that one does so itself."""
    with _locked(folder) as free:
        for path in segments(folder) if free else ():
            _rewrite(path, [record for record in read_segments([path]) if record["participant"] != participant])


def _rewrite(path: Path, records: list[dict[str, Any]]) -> None:
    data = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records).encode()
    write_atomically(path, lambda file: file.write(data))


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether no server has the log open; none opens it meanwhile. Where there is no log there is nothing to lock."""
    if not (folder / "lock").exists():
        yield True
        return
    with (folder / "lock").open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
