"""Coverage, width and power of the intervals of a user study's win rate, in simulated studies.

    python -m benchmarks.study_intervals                       # all tables, minutes
    python -m benchmarks.study_intervals --studies 100 --table coverage

Each person answers pairs with log odds = mean + person + prompt, normal with `sd_people` and `sd_prompts`; the mean is
set so that the true rate, over all people and prompts, is `rate`. Either all people see the same pairs, or each sees
other ones of a larger number. `ours` is the interval of `hgdpo study results`; beside it Owen's pigeonhole bootstrap
with percentiles, and the exact binomial interval, which takes all votes for independent.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from hgdpo_core.metrics import WinRate
from hgdpo_core.statistics.clusters import win_rate_of_votes
from hgdpo_core.statistics.intervals import percentile_interval

DRAWS = 400
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(61)
Ends = tuple[float, float]


@dataclass(frozen=True)
class Design:
    """A study to simulate."""

    people: int
    questions: int
    """Pairs that each person sees."""
    pairs: int
    """Of the study."""
    rate: float = 0.6
    sd_people: float = 0.5
    sd_prompts: float = 0.8
    """Of log odds."""

    @functools.cached_property
    def mean(self) -> float:
        """The mean log odds at which the true rate is `rate`, by Gauss-Hermite quadrature and bisection."""
        sd, low, high = np.hypot(self.sd_people, self.sd_prompts), -20.0, 20.0
        for _ in range(80):
            middle = (low + high) / 2
            reached = float(WEIGHTS @ expit(middle + sd * NODES) / WEIGHTS.sum())
            low, high = (middle, high) if reached < self.rate else (low, middle)
        return low

    def simulate(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Who won, bool [people, pairs], and which pairs each person saw: windows on one circle, as studies have."""
        odds = self.mean + rng.normal(0, self.sd_people, (self.people, 1)) + rng.normal(0, self.sd_prompts, self.pairs)
        starts = self.questions * np.arange(self.people)[:, None]
        seen = np.zeros(odds.shape, dtype=bool)
        np.put_along_axis(seen, (starts + np.arange(self.questions)) % self.pairs, True, axis=1)
        return (rng.random(odds.shape) < expit(odds)) & seen, seen


def ours(won: np.ndarray, seen: np.ndarray, rng: np.random.Generator) -> Ends | None:
    """The interval of `hgdpo study results`."""
    people, prompts = np.nonzero(seen)
    rate = win_rate_of_votes(won[seen], people, prompts)
    return None if rate.ci_low is None or rate.ci_high is None else (rate.ci_low, rate.ci_high)


def pigeonhole(won: np.ndarray, seen: np.ndarray, rng: np.random.Generator) -> Ends | None:
    """Percentiles of Owen's bootstrap (2007): people and prompts are drawn, and their counts multiplied."""
    people, prompts = (rng.multinomial(n, np.full(n, 1 / n), DRAWS).astype(np.float64) for n in won.shape)
    wins, decided = (((people @ side) * prompts).sum(axis=1) for side in (won.astype(float), seen.astype(float)))
    return percentile_interval(np.divide(wins, decided, out=np.full(DRAWS, np.nan), where=decided > 0),
                               unknown=(0.0, 1.0))


def binomial(won: np.ndarray, seen: np.ndarray, rng: np.random.Generator) -> Ends | None:
    """Clopper and Pearson's, as if all votes were independent."""
    wins = int(won.sum())
    rate = WinRate.from_counts(wins, int(seen.sum()) - wins, 0)
    return None if rate.ci_low is None or rate.ci_high is None else (rate.ci_low, rate.ci_high)


METHODS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], Ends | None]] = {
    "ours": ours, "pigeonhole": pigeonhole, "binomial": binomial}


@dataclass(frozen=True)
class Measured:
    """Of many simulated studies: how often the interval holds the true rate, and excludes 50 %; its mean half width."""

    coverage: float
    half_width: float
    power: float


def measure(design: Design, studies: int, seed: int = 0, methods: Sequence[str] = ("ours",)) -> dict[str, Measured]:
    """Simulate studies; all methods see the same ones."""
    rng, ends = np.random.default_rng(seed), {name: [] for name in methods}
    for _ in range(studies):
        won, seen = design.simulate(rng)
        for name in methods:
            ends[name].append(METHODS[name](won, seen, rng) or (0.0, 1.0))
    return {name: _measured(np.array(found), design.rate) for name, found in ends.items()}


def _measured(ends: np.ndarray, rate: float) -> Measured:
    low, high = ends.T
    return Measured(float(((low <= rate) & (rate <= high)).mean()), float((high - low).mean() / 2),
                    float(((low > 0.5) | (high < 0.5)).mean()))


SETTINGS = [(5, 40, 40), (5, 40, 100), (20, 20, 20), (20, 20, 100), (100, 12, 12), (100, 12, 240)]
"""People, questions to each, and pairs of the study."""
DIFFERENCES = [(0.5, 0.8), (0.0, 0.0)]
SIZES = [(5, 40, 40), (10, 40, 40), (10, 40, 80), (20, 30, 30), (20, 30, 120), (40, 30, 30), (40, 30, 240),
         (40, 40, 40), (40, 40, 320)]


def coverage_designs() -> Iterator[Design]:
    """All settings, with and without people and prompts that differ, at two true rates; and people who differ a lot."""
    for (people, questions, pairs), (sd_people, sd_prompts), rate in itertools.product(
            SETTINGS, DIFFERENCES, (0.6, 0.85)):
        yield Design(people, questions, pairs, rate, sd_people, sd_prompts)
    for people, questions, pairs in SETTINGS[::2]:
        yield Design(people, questions, pairs, 0.6, 1.5, 0.8)


def coverage_table(studies: int, methods: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown."""
    head = [f"{name}: {what}" for name in methods for what in ("covers, %", "± points")]
    yield "| people x questions | pairs | sd of people, prompts | true rate | " + " | ".join(head) + " |"
    yield "|" + "---|" * (4 + len(head))
    for design in coverage_designs():
        cells = [f"{100 * one.coverage:.1f} | {100 * one.half_width:.1f}"
                 for one in measure(design, studies, methods=methods).values()]
        yield (f"| {design.people} x {design.questions} | {design.pairs} | {design.sd_people}, {design.sd_prompts} | "
               f"{design.rate} | {' | '.join(cells)} |")


def size_table(studies: int, methods: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown: half width and power at a true rate of 60 %."""
    head = [f"{name}: {what}" for name in methods for what in ("± points", "power")]
    yield "| people x questions | pairs | answers | " + " | ".join(head) + " |"
    yield "|" + "---|" * (3 + len(head))
    for people, questions, pairs in SIZES:
        cells = [f"{100 * one.half_width:.1f} | {one.power:.2f}"
                 for one in measure(Design(people, questions, pairs), studies, methods=methods).values()]
        yield f"| {people} x {questions} | {pairs} | {people * questions:,} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--studies", type=int, default=1000, help="simulated studies for each row")
    parser.add_argument("--table", choices=("coverage", "size"), help="only this one")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="only these")
    options = parser.parse_args(arguments)
    for name, table in (("coverage", coverage_table), ("size", size_table)):
        if options.table in (None, name):
            for line in table(options.studies, options.methods):
                print(line, flush=True)
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
