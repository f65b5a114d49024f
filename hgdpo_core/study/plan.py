"""Who sees what: the trials of each participant, from the study's settings and the participant's number alone.

Participants 0, 1, 2, ... take windows that follow each other on one circle of all pairs, so at any time two pairs
differ by at most one in how many people were given them. Each time the circle comes around, a pair has its sides
swapped. All that is random is a hash: the plan is the same in every version of every library.
"""

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from hgdpo_core.config.study import StudyConfig
from hgdpo_core.study.votes import Kind

T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """One question to one participant."""

    pair: int
    """Number of the pair in the study."""
    kind: Kind
    swapped: bool
    """Whether the second image is on the left; of a check, the noise."""
    picture: Literal["first", "second"] | None = None
    """Of a check: the image of the pair that is shown beside its noise."""


def plan_trials(pairs: int, config: StudyConfig, number: int) -> list[Trial]:
    """The trials of participant `number`, from 0, in their order, of a study of so many pairs."""
    each = min(config.questions, pairs)
    circle, starts_swapped = _circle(pairs, config.seed)
    questions = []
    for place in range(number * each, (number + 1) * each):
        rounds, on_circle = divmod(place, pairs)
        pair = circle[on_circle]
        questions.append(Trial(pair, "question", (pair in starts_swapped) != (rounds % 2 == 1)))
    trials = shuffled(questions, config.seed, number, "order")
    _insert(trials, _repeats(trials, config, number), len(trials) // 2 + 1, config.seed, number, "repeats")
    _insert(trials, _checks(pairs, trials, each, config, number), 1, config.seed, number, "checks")
    return trials


@functools.cache
def _circle(pairs: int, seed: int) -> tuple[list[int], frozenset[int]]:
    """The pairs in the order of the circle, and that half of them whose sides are swapped the first time."""
    return shuffled(range(pairs), seed, "circle"), frozenset(shuffled(range(pairs), seed, "sides")[1::2])


def count_trials(pairs: int, config: StudyConfig) -> int:
    """How many questions each participant answers, repeats and checks included."""
    return len(plan_trials(pairs, config, 0))


def count_people(pairs: int, config: StudyConfig) -> int:
    """How many participants it takes until each pair is seen by `config.people`."""
    return math.ceil(pairs * config.people / min(config.questions, pairs))


def shuffled(items: Iterable[T], *key: object) -> list[T]:
    """The items in an order that depends on their number and the key alone."""
    listed = list(items)
    return [listed[i] for i in sorted(range(len(listed)), key=lambda i: _digest(*key, i))]


def _digest(*key: object) -> bytes:
    return hashlib.sha256("/".join(map(str, key)).encode()).digest()


def _count(fraction: float, questions: int) -> int:
    """A part of the questions, at least one unless the part is none."""
    return max(1, round(fraction * questions)) if fraction else 0


def _repeats(trials: Sequence[Trial], config: StudyConfig, number: int) -> list[Trial]:
    """Some of the first half's questions, swapped; not its last one, which the repeat might follow at once."""
    early = trials[:max(1, len(trials) // 2)]
    chosen = shuffled(early, config.seed, number, "repeated")[:_count(config.repeats, len(trials))]
    return [Trial(trial.pair, "repeat", not trial.swapped) for trial in chosen]


def _checks(pairs: int, trials: Sequence[Trial], each: int, config: StudyConfig, number: int) -> list[Trial]:
    """Checks, of pairs that this participant does not see where there are others; their sides alternate."""
    seen = {trial.pair for trial in trials}
    others = [pair for pair in range(pairs) if pair not in seen] or list(range(pairs))
    count, start = _count(config.checks, each), _digest(config.seed, number, "check sides")[0]
    chosen = shuffled(others, config.seed, number, "checked")
    return [Trial(chosen[i % len(chosen)], "check", (start + i) % 2 == 1, "first" if (start // 2 + i) % 2 else "second")
            for i in range(count)]


def _insert(trials: list[Trial], more: Sequence[Trial], earliest: int, *key: object) -> None:
    """Put `more` at random places of `trials`, none before the place `earliest`."""
    for number, trial in enumerate(more):
        free = len(trials) + 1 - min(earliest, len(trials))
        place = int.from_bytes(_digest(*key, "place", number)[:8]) % free
        trials.insert(min(earliest, len(trials)) + place, trial)
