"""A study under way: its participants, what each is asked next, and their votes.

All of it is in memory, and known again after a restart: from the store, and from the log of what had not reached it.
Every answer is in the log before `answer` returns.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hgdpo_core.errors import InputError, StorageError
from hgdpo_core.storage.shards import write_table
from hgdpo_core.study.log import VoteLog, read_segments
from hgdpo_core.study.plan import Trial
from hgdpo_core.study.study import Study, StudyPair
from hgdpo_core.study.votes import (
    STUDIES,
    VOTES,
    Choice,
    delete_participant,
    list_participants,
    participant_key,
    participant_of,
    read_votes,
)

UNUSED_SECONDS = 600.0  # then the place of a participant who has answered nothing is given to the next
IDLE_SECONDS = 86_400.0  # and that of one who stopped on the way
CODE_BYTES = 16
MOVES_TOGETHER = 4  # requests to the store; more keep the interpreter from those who wait for an answer

logger = logging.getLogger(__name__)


class FullStudyError(InputError):
    """Every pair has as many people as requested, or will have."""


class UnknownTrialError(InputError):
    """No trial of this participant, or not one that they have been asked yet."""


class ChangedMeanwhileError(InputError):
    """The answer is to a question that was answered or corrected meanwhile: another tab is further."""


class _Joined(BaseModel):
    """A participant's file."""

    model_config = ConfigDict(extra="forbid", strict=True)
    number: int = Field(ge=0)
    joined: int


@dataclass(slots=True)
class Vote:
    """An answer: what of its row in VOTES is not planned. Small, for a server holds all of them in memory."""

    choice: Choice
    shown_at: float
    """Seconds since 1970."""
    ms: int
    revision: int = 0
    """How often it was corrected."""


@dataclass
class Participant:
    """A person who takes part. Trials are answered in their order; only the last answer can be corrected."""

    id: str
    number: int
    joined: float
    """Seconds since 1970."""
    trials: list[Trial]
    votes: dict[int, Vote] = field(default_factory=dict)
    """By the trial's position."""
    active: float = 0.0
    """When the last answer came, in seconds since 1970."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def done(self) -> int:
        """Trials answered: those before the position of the next."""
        return len(self.votes)

    @property
    def finished(self) -> bool:
        return self.done == len(self.trials)

    def holds_place(self, now: float) -> bool:
        """Whether no other person should get this participant's pairs."""
        if self.finished:
            return True
        return now - max(self.joined, self.active) < (IDLE_SECONDS if self.votes else UNUSED_SECONDS)


class StudySession:
    """Takes the answers to one study. One process at a time; `close` at the end."""

    def __init__(self, study: Study, folder: Path):
        """`folder`: of the log. InputError where another process has it open; StorageError where it cannot be used."""
        self.study = study
        self.log = VoteLog(folder)
        self.participants: dict[str, Participant] = {}
        self._trials: dict[str, tuple[Participant, int]] = {}
        self._changed: set[str] = set()
        self._is_local = study.store.local_path(study.key) is not None
        try:
            self._read()
        except BaseException:
            self.log.close()
            raise

    # -- participants

    async def join(self) -> tuple[Participant, str]:
        """A new participant, stored, and their code. FullStudyError where no more are needed."""
        now, code = time.time(), secrets.token_urlsafe(CODE_BYTES)
        participant_id = participant_of(self.study.id, code)
        participant = self._add(participant_id, self._free_number(now), now)
        try:
            await asyncio.to_thread(self.study.store.write_json, participant_key(self.study.id, participant_id),
                                    {"number": participant.number, "joined": round(now)})
        except BaseException:
            self._drop(participant_id)
            raise
        return participant, code

    def find(self, code: str | None) -> Participant | None:
        """The participant of a code."""
        return None if code is None else self.participants.get(participant_of(self.study.id, code))

    def withdraw(self, participant: Participant) -> None:
        """Delete a participant with all votes, in the store; in the log with the next `move`."""
        self._drop(participant.id)
        delete_participant(self.study.store, self.study.id, participant.id)

    # -- questions and answers

    def trial_id(self, participant: Participant, position: int) -> str:
        """Says nothing, and no other participant can know it."""
        return participant_of(self.study.id, f"{participant.id}/{position}")

    def locate(self, participant: Participant, trial: str) -> tuple[int, Trial, StudyPair]:
        """Position and content of a trial that the participant was asked, or is asked next."""
        owner, position = self._trials.get(trial, (None, 0))
        if owner is not participant or position > participant.done + 1:
            raise UnknownTrialError("there is no such question for you: load the page again")
        planned = participant.trials[position]
        return position, planned, self.study.pairs[planned.pair]

    async def answer(self, participant: Participant, trial: str, choice: Choice, revision: int, ms: int) -> bool:
        """Store an answer; False for one that is stored already, and is left as it is.

        `revision`: 0 for a first answer, 1 for its first correction. `ms`: how long the images were seen before it.
        UnknownTrialError and ChangedMeanwhileError for what cannot be answered, StorageError for a full disk.
        """
        position, _, _ = self.locate(participant, trial)
        async with participant.lock:
            known = participant.votes.get(position)
            if known is not None and revision <= known.revision:
                return False
            correction = known is not None and position == participant.done - 1 and revision == known.revision + 1
            if not correction and (known is not None or position != participant.done or revision != 0):
                raise ChangedMeanwhileError("this is not your present question nor the last one: load the page again")
            now = time.time()
            vote = Vote(choice, now - ms / 1000, ms, revision)
            await asyncio.wrap_future(self.log.append(_to_record(self._row(participant, position, vote), revision)))
            participant.votes[position] = vote
            participant.active = now
            return True

    # -- the store

    def move(self) -> int:
        """Put new votes into the store and delete the log's closed segments; returns how many participants had some.

        StorageError leaves the log as it was: the next call tries again.
        """
        closed = self.log.rotate()
        for record in read_segments(closed):
            self._keep(record)
        changed = [self.participants[name] for name in sorted(self._changed) if name in self.participants]
        # on a disk one after the other: the log, which people wait for, shares the disk's queue and the interpreter
        together = 1 if self._is_local else MOVES_TOGETHER
        with ThreadPoolExecutor(together) as pool:
            list(pool.map(self._store, changed))
        self._changed.clear()
        self.log.delete(closed)
        return len(changed)

    def close(self) -> None:
        """Put all votes into the store and give the log free; what the store does not take stays in the log."""
        try:
            self.move()
        except StorageError as error:
            logger.warning("votes stay in %s, the next start moves them: %s", self.log.folder, error)
        finally:
            self.log.close()

    # -- below

    def _read(self) -> None:
        """All participants and votes of the store and of the log."""
        store, study_id = self.study.store, self.study.id
        keys = {participant_key(study_id, name): name for name in list_participants(store, study_id)}
        for key, data in store.read_many(keys).items():
            try:
                record = _Joined.model_validate_json(data)
            except ValidationError:
                raise StorageError(f"{store.url(key)} is damaged: expected a participant's number and time; delete it, "
                                   "and this participant's votes no longer count") from None
            self._add(keys[key], record.number, record.joined)
        for row in read_votes(store, study_id).to_pylist():
            self._restore(row, revision=0)
        for record in self.log.recovered:
            self._keep(record)

    def _keep(self, record: dict[str, Any]) -> None:
        """A vote of the log, unless a later one of the same trial is known."""
        self._restore(_to_row(record), record["revision"])
        self._changed.add(record["participant"])

    def _restore(self, row: dict[str, Any], revision: int) -> None:
        owner, position = self._trials.get(row["trial"], (None, 0))
        if owner is None or owner.id not in self.participants:
            return  # withdrawn
        known = owner.votes.get(position)
        shown_at = row["shown_at"].timestamp()
        if known is None or (revision, shown_at) > (known.revision, known.shown_at):
            owner.votes[position] = Vote(row["choice"], shown_at, row["ms"], revision)
            owner.active = max(owner.active, shown_at + row["ms"] / 1000)

    def _row(self, participant: Participant, position: int, vote: Vote) -> dict[str, Any]:
        """A vote as a row of VOTES."""
        trial = participant.trials[position]
        pair = self.study.pairs[trial.pair]
        left, right = pair.sides(trial)
        return {"trial": self.trial_id(participant, position), "pair": pair.pair, "prompt_id": pair.prompt_id,
                "left": left, "right": right, "choice": vote.choice, "kind": trial.kind, "participant": participant.id,
                "shown_at": datetime.fromtimestamp(vote.shown_at, UTC), "ms": vote.ms}

    def _store(self, participant: Participant) -> None:
        """Write a participant's votes, unless the participant was deleted meanwhile, by whatever process."""
        store, study_id = self.study.store, self.study.id
        key = f"{STUDIES}/{study_id}/votes/{participant.id}-{self.log.writer}.parquet"
        rows = [self._row(participant, position, vote) for position, vote in sorted(participant.votes.items())]
        if store.exists(participant_key(study_id, participant.id)):
            write_table(store, key, pa.Table.from_pylist(rows, schema=VOTES))
        if not store.exists(participant_key(study_id, participant.id)):
            self._drop(participant.id)
            store.delete(key)

    def _add(self, participant_id: str, number: int, joined: float) -> Participant:
        participant = Participant(participant_id, number, joined, self.study.trials(number))
        self.participants[participant_id] = participant
        self._trials |= {self.trial_id(participant, position): (participant, position)
                         for position in range(len(participant.trials))}
        return participant

    def _drop(self, participant_id: str) -> None:
        participant = self.participants.pop(participant_id, None)
        if participant is not None:
            for position in range(len(participant.trials)):
                self._trials.pop(self.trial_id(participant, position), None)

    def _free_number(self, now: float) -> int:
        """The first free place in the plan."""
        held = {participant.number for participant in self.participants.values() if participant.holds_place(now)}
        free = _first_missing(held)
        if free >= self.study.people:
            raise FullStudyError("this study has all the people it needs: thank you for coming")
        return free


def _first_missing(numbers: Iterable[int]) -> int:
    taken: Sequence[int] = sorted(set(numbers))
    return next((i for i, number in enumerate(taken) if i != number), len(taken))


def _to_record(row: dict[str, Any], revision: int) -> dict[str, Any]:
    return {**row, "shown_at": row["shown_at"].isoformat(), "revision": revision}


def _to_row(record: dict[str, Any]) -> dict[str, Any]:
    return {name: datetime.fromisoformat(record[name]) if name == "shown_at" else record[name] for name in VOTES.names}
