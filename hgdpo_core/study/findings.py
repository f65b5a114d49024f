"""The numbers of a study, from its votes and pairs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

import numpy as np

from hgdpo_core.metrics import WinRate
from hgdpo_core.statistics.clusters import win_rate_of_votes
from hgdpo_core.statistics.intervals import Estimate
from hgdpo_core.study import rules
from hgdpo_core.study.agreement import JudgeAgreement, alpha_estimate, judge_agreement
from hgdpo_core.study.rules import Checked, Repeats, Vote, chosen_name
from hgdpo_core.study.statistics import MoreAnswers, Strength, bradley_terry, more_answers

HALF_WIDTH = 0.05
"""The wanted precision unless another is asked for: 5 points, as for 1,600 votes of 40 people."""


@dataclass(frozen=True)
class ModelRate:
    """How often people preferred a model to another one."""

    model: str
    against: str
    people: int
    prompts: int
    rate: WinRate
    more: MoreAnswers | None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; the rate's fields as in `summary.json`."""
        return {"model": self.model, "against": self.against, "people": self.people, "prompts": self.prompts,
                **self.rate.as_dict(), "more_answers": self.more and asdict(self.more)}


@dataclass(frozen=True)
class StudyResults:
    """All numbers of a study. What is not said otherwise is without excluded participants."""

    study_id: str
    sources: Sequence[str]
    """Keys of what its pairs come from."""
    read: int
    """Votes read: those used and those left out."""
    left_out: Mapping[str, int]
    """Reason -> votes."""
    participants: Sequence[Checked]
    half_width: float
    """Wanted of the win rates' intervals."""
    rates: Sequence[ModelRate]
    """Each model against each that it was compared with, in both directions."""
    rates_of_all: Sequence[ModelRate]
    """The same with excluded participants."""
    strengths: Sequence[Strength]
    """Bradley and Terry's, the strongest first; empty for two models."""
    alpha: Estimate
    """Krippendorff's, of the pairs' values first model, second model, cannot tell."""
    judges: Sequence[JudgeAgreement]
    repeats: Repeats
    left_chosen: WinRate
    """How often the left image was chosen: far from a half, sides mattered."""
    median_seconds: float | None
    """Of a question."""

    @property
    def used(self) -> int:
        """Votes, ties among them, that the win rates count."""
        return self.read - sum(self.left_out.values())

    @property
    def excluded(self) -> list[Checked]:
        return [one for one in self.participants if one.excluded]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "study_id": self.study_id, "sources": list(self.sources), "rule": rules.RULE,
            "votes": {"read": self.read, "used": self.used, "left_out": dict(self.left_out)},
            "participants": {"answered": len(self.participants), "excluded": len(self.excluded),
                             "checks": [{**asdict(one), "excluded": one.excluded} for one in self.participants]},
            "half_width": self.half_width, "win_rates": [one.as_dict() for one in self.rates],
            "win_rates_with_excluded": [one.as_dict() for one in self.rates_of_all],
            "bradley_terry": [asdict(one) for one in self.strengths], "krippendorff_alpha": self.alpha.as_dict(),
            "judges": {one.judge: {"votes": one.votes.as_dict(), "pairs": one.pairs.as_dict()} for one in self.judges},
            "repeats": asdict(self.repeats), "left_chosen": self.left_chosen.as_dict(),
            "median_seconds": self.median_seconds}


def evaluate_votes(study_id: str, sources: Sequence[str], votes: Sequence[Vote], pairs: Sequence[Mapping[str, Any]], *,
                   half_width: float = HALF_WIDTH) -> tuple[StudyResults, list[str | None]]:
    """The results, and why each vote is left out; `votes` are rows of VOTES, `pairs` those of `read_pairs`."""
    models = {pair["pair"]: {pair["first"], pair["second"]} for pair in pairs}
    participants = rules.check_participants(votes)
    excluded = {one.participant for one in participants if one.excluded}
    reasons = rules.reasons_left_out(votes, models, excluded)
    used = [vote for vote, reason in zip(votes, reasons, strict=True) if reason is None]
    everyone = rules.reasons_left_out(votes, models, set())
    with_excluded = [vote for vote, reason in zip(votes, everyone, strict=True) if reason is None]
    decided = [vote for vote in used if vote["choice"] != "tie"]
    results = StudyResults(
        study_id, tuple(sources), len(votes), dict(Counter(reason for reason in reasons if reason)), participants,
        half_width, model_rates(used, half_width), model_rates(with_excluded, half_width), _strengths(decided),
        alpha_estimate(_column(used, "pair"), list(map(_value, used)), _column(used, "participant"),
                       _column(used, "prompt_id")),
        _judges(used, pairs), rules.count_repeats(votes, used, excluded),
        win_rate_of_votes(np.array([vote["choice"] == "left" for vote in decided], dtype=bool),
                          _column(decided, "participant"), _column(decided, "prompt_id"), len(used) - len(decided)),
        float(np.median(_column(used, "ms"))) / 1000 if used else None)
    return results, reasons


def model_rates(votes: Sequence[Vote], half_width: float) -> list[ModelRate]:
    """Win rates of all ordered pairs of models that used votes compare."""
    names = sorted({vote[side] for vote in votes for side in ("left", "right")})
    rates = []
    for model, against in permutations(names, 2):
        both = [vote for vote in votes if {vote["left"], vote["right"]} == {model, against}]
        if both:
            rates.append(_model_rate(model, against, both, half_width))
    return rates


def _model_rate(model: str, against: str, votes: Sequence[Vote], half_width: float) -> ModelRate:
    decided = [vote for vote in votes if vote["choice"] != "tie"]
    won = np.array([chosen_name(vote) == model for vote in decided], dtype=bool)
    people, prompts = _column(decided, "participant"), _column(decided, "prompt_id")
    return ModelRate(model, against, len(set(_column(votes, "participant"))), len(set(_column(votes, "prompt_id"))),
                     win_rate_of_votes(won, people, prompts, len(votes) - len(decided)),
                     more_answers(won, people, prompts, half_width))


def _strengths(decided: Sequence[Vote]) -> list[Strength]:
    winners = [vote[vote["choice"]] for vote in decided]
    losers = [vote["right" if vote["choice"] == "left" else "left"] for vote in decided]
    if len({*winners, *losers}) <= 2:
        return []
    return bradley_terry(winners, losers, _column(decided, "participant"), _column(decided, "prompt_id"))


def _value(vote: Vote) -> str:
    """What a vote says of its pair, whichever model was on the left."""
    name = chosen_name(vote)
    return "tie" if name is None else "first" if name == min(vote["left"], vote["right"]) else "second"


def _judges(votes: Sequence[Vote], pairs: Sequence[Mapping[str, Any]]) -> list[JudgeAgreement]:
    by_pair = {pair["pair"]: pair for pair in pairs}
    names = sorted({name for pair in pairs for name in pair["first_scores"].keys() & pair["second_scores"].keys()})
    choices = np.array([_choice(vote, by_pair[vote["pair"]]) for vote in votes], dtype=np.float64)
    return [judge_agreement(name, np.array([_margin(name, by_pair[vote["pair"]]) for vote in votes]), choices,
                            _column(votes, "pair"), _column(votes, "participant"), _column(votes, "prompt_id"))
            for name in names if votes]


def _choice(vote: Vote, pair: Mapping[str, Any]) -> int:
    name = chosen_name(vote)
    return 0 if name is None else 1 if name == pair["second"] else -1


def _margin(judge: str, pair: Mapping[str, Any]) -> float:
    first, second = pair["first_scores"].get(judge), pair["second_scores"].get(judge)
    return float("nan") if first is None or second is None else second - first


def _column(votes: Sequence[Vote], name: str) -> list[Any]:
    return [vote[name] for vote in votes]
