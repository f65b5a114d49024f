"""Which votes count: fixed before the first vote, the same for every study, and each vote left out has its reason.

A participant is excluded who failed half or more of the attention checks they answered ("cannot tell" fails too). Of
two checks, a person who presses keys at random fails at least one in three cases of four. Repeats that contradict the
first answer are no reason for exclusion: on hard pairs honest people contradict themselves. They are reported.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from hgdpo_core.study.votes import Choice, Kind

FAILED_FRACTION = 0.5
RULE = "a participant is excluded who failed half or more of the attention checks they answered"

REPEAT = "a repeat, to see whether people agree with themselves"
CHECK = "an attention check"
EXCLUDED = "by a participant who failed the attention checks"
UNKNOWN = "not a vote of this study: its pair, models, choice or kind is unknown"
AGAIN = "a later vote of the same participant on the same pair"

Vote = dict[str, Any]
"""A row of VOTES."""


@dataclass(frozen=True)
class Checked:
    """How a participant did in the attention checks."""

    participant: str
    failed: int
    checks: int

    @property
    def excluded(self) -> bool:
        return self.checks > 0 and self.failed >= FAILED_FRACTION * self.checks


def chosen_name(vote: Vote) -> str | None:
    """The name of the chosen side; None for "cannot tell"."""
    return None if vote["choice"] == "tie" else vote[vote["choice"]]


def check_participants(votes: Sequence[Vote]) -> list[Checked]:
    """All participants in order, those without checks among them."""
    checks, failed = Counter[str](), Counter[str]()
    for vote in votes:
        if vote["kind"] == "check" and _is_check(vote):
            checks[vote["participant"]] += 1
            failed[vote["participant"]] += chosen_name(vote) != "picture"
    return [Checked(name, failed[name], checks[name]) for name in sorted({vote["participant"] for vote in votes})]


def reasons_left_out(votes: Sequence[Vote], models: dict[str, set[str]], excluded: set[str]) -> list[str | None]:
    """Why each vote is left out of the win rate, in their order; None where it is used.

    `models`: pair -> names of its two models.
    """
    seen: set[tuple[str, str]] = set()
    reasons: list[str | None] = []
    for vote in votes:
        reason = _reason(vote, models, excluded)
        key = vote["participant"], vote["pair"]
        if reason is None and key in seen:
            reason = AGAIN
        elif reason is None:
            seen.add(key)
        reasons.append(reason)
    return reasons


def _reason(vote: Vote, models: dict[str, set[str]], excluded: set[str]) -> str | None:
    if vote["kind"] not in get_args(Kind) or vote["choice"] not in get_args(Choice) or vote["pair"] not in models:
        return UNKNOWN
    if vote["kind"] == "check":
        return CHECK if _is_check(vote) else UNKNOWN
    if {vote["left"], vote["right"]} != models[vote["pair"]]:
        return UNKNOWN
    if vote["kind"] == "repeat":
        return REPEAT
    return EXCLUDED if vote["participant"] in excluded else None


def _is_check(vote: Vote) -> bool:
    return {vote["left"], vote["right"]} == {"picture", "noise"} and vote["choice"] in get_args(Choice)


@dataclass(frozen=True)
class Repeats:
    """Pairs that a participant saw twice, with sides swapped."""

    repeated: int
    consistent: int
    """The same image was chosen both times, or neither."""


def count_repeats(votes: Sequence[Vote], used: Sequence[Vote], excluded: set[str]) -> Repeats:
    """Repeats of used votes, by participants who are not excluded."""
    first = {(vote["participant"], vote["pair"]): chosen_name(vote) for vote in used}
    again = [vote for vote in votes if vote["kind"] == "repeat" and vote["participant"] not in excluded
             and vote["choice"] in get_args(Choice) and (vote["participant"], vote["pair"]) in first]
    same = sum(chosen_name(vote) == first[vote["participant"], vote["pair"]] for vote in again)
    return Repeats(len(again), same)
