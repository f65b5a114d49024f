"""The result in plain sentences that claim no more than the intervals support."""

from collections.abc import Mapping, Sequence, Set

from hgdpo_core.built_in import is_built_in
from hgdpo_core.metrics import WinRate
from hgdpo_core.progress import count_of
from hgdpo_core.rendering.parts import percent, percent_interval
from hgdpo_core.report.data import ReportData
from hgdpo_core.scorers import scorer_title
from hgdpo_core.training.objective import find_objective

READINGS = {"better": "The whole interval lies above 50 %: by this scorer the tuned model is better.",
            "worse": "The whole interval lies below 50 %: by this scorer the tuned model is worse.",
            "open": "The interval contains 50 %: these prompts do not show which model is better."}
BUILT_IN_TITLES = {"pickscore": "the figures judge", "tinted": "the tinted figures judge",
                   "inspector": "the figures inspector"}
FINDINGS = {"better": "better", "worse": "worse", "open": "neither surely better nor surely worse"}


def headline(data: ReportData) -> str:
    """The result in one sentence, with its interval and counts; the built-in scorers are named as what they are."""
    name, rate = next(iter(data.comparison.win_rates.items()))
    weight, prompts, own = data.comparison.lora_weight, count_of(rate.n, "held-out prompt"), _built_in_scorers(data)
    scorer = BUILT_IN_TITLES.get(name, scorer_title(name)) if name in own else scorer_title(name)
    start = _capital(scorer) if weight is None else f"With the LoRA at weight {float(weight)}, {scorer}"
    return f"{start} {_preference(rate, prompts)}{_witness(data, name, own)}."


def _preference(rate: WinRate, prompts: str) -> str:
    if rate.rate is None:
        return f"tells the two models apart on none of {prompts}"
    tally = f"{count_of(rate.wins, 'win')}, {count_of(rate.losses, 'loss', 'losses')}"
    interval = f"95 % interval {percent_interval(rate.ci_low, rate.ci_high)}"
    start = f"prefers the tuned model on {percent(rate.rate)} of"
    if not rate.ties:
        return f"{start} {prompts} ({interval}; {tally}, no ties)"
    ties = count_of(rate.ties, "tie")
    return f"{start} the held-out prompts it tells apart ({interval}; {tally}, {ties} among {rate.n:,} prompts)"


def _witness(data: ReportData, first: str, own: Set[str]) -> str:
    """The other built-in scorer's rate beside the headline's; it is independent where the first ranked the pools."""
    rate = data.comparison.win_rates.get("inspector")
    if first == "inspector" or "inspector" not in own or first not in own or rate is None or rate.rate is None:
        return ""
    independent = ", which ranked no pool," if data.training_scorer == first else ""
    return f"; the figures inspector{independent} on {percent(rate.rate)}"


def _built_in_scorers(data: ReportData) -> set[str]:
    return {scorer.name for scorer in data.config.evaluation.scorers if is_built_in(scorer.source)}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def read_interval(data: ReportData) -> str:
    """What the headline's interval shows, what the choice of scorer does not show, and the verdicts of the others."""
    name, rate = next(iter(data.comparison.win_rates.items()))
    undecided = rate.ci_low is None
    reading = "Without a single win or loss there is no win rate." if undecided else READINGS[_verdict(rate)]
    if name == data.training_scorer:
        on_prompts = find_objective(data.objective).trains_on == "prompts"
        reading += (f" The same scorer {'was the reward of the training' if on_prompts else 'chose the training pairs'}"
                    ", so this measures whether training reached its aim, not what people prefer.")
    return reading + _other_scorers(data.comparison.win_rates)


def _other_scorers(win_rates: Mapping[str, WinRate]) -> str:
    verdicts: dict[str, list[str]] = {verdict: [] for verdict in FINDINGS}
    for name, rate in list(win_rates.items())[1:]:
        verdicts[_verdict(rate)].append(scorer_title(name))
    findings = [f"{_join(names)} {'finds' if len(names) == 1 else 'find'} it {FINDINGS[verdict]}"
                for verdict, names in verdicts.items() if names]
    return f" Of the other judges, {'; '.join(findings)}." if findings else ""


def _verdict(rate: WinRate) -> str:
    if rate.ci_low is not None and rate.ci_low > 0.5:
        return "better"
    return "worse" if rate.ci_high is not None and rate.ci_high < 0.5 else "open"


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
