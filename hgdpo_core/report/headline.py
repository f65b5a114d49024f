"""The result in words, no stronger than its intervals; plain text."""

from collections.abc import Sequence

from hgdpo_core.metrics import WinRate
from hgdpo_core.rendering.parts import count_of, percent, rate_interval
from hgdpo_core.report.data import ReportData
from hgdpo_core.scorers import scorer_title


def headline(data: ReportData) -> str:
    """The result in one sentence, with its interval and counts."""
    if not data.win_rates:
        return "This run has no evaluation."
    name, rate = next(iter(data.win_rates.items()))
    scorer, prompts = scorer_title(name), count_of(rate.n, "held-out prompt")
    start = scorer if data.lora_weight is None else f"With the LoRA at weight {float(data.lora_weight)}, {scorer}"
    if rate.rate is None:
        return f"{start} tells the two models apart on none of {prompts}."
    tally = f"{count_of(rate.wins, 'win')}, {count_of(rate.losses, 'loss', 'losses')}"
    interval = f"95 % interval {rate_interval(rate)}"
    start += f" prefers the tuned model on {percent(rate.rate)} of"
    if not rate.ties:
        return f"{start} {prompts} ({interval}; {tally}, no ties)."
    ties = count_of(rate.ties, "tie")
    return f"{start} the held-out prompts it tells apart ({interval}; {tally}, {ties} among {rate.n:,} prompts)."


def read_interval(data: ReportData) -> str:
    """What the headline's interval allows to say, what the choice of scorer does not, and what the others say."""
    if not data.win_rates:
        return ""
    name, rate = next(iter(data.win_rates.items()))
    if rate.ci_low is None or rate.ci_high is None:
        reading = "Without a single win or loss there is no win rate."
    elif rate.ci_low > 0.5:
        reading = "The whole interval lies above 50 %: by this scorer the tuned model is better."
    elif rate.ci_high < 0.5:
        reading = "The whole interval lies below 50 %: by this scorer the tuned model is worse."
    else:
        reading = "The interval contains 50 %: these prompts do not show which model is better."
    if name == data.training_judge:
        reading += (" The same scorer chose the training pairs, so this measures whether training reached its aim, "
                    "not what people prefer.")
    return reading + _other_judges(data, name)


def _other_judges(data: ReportData, headline_name: str) -> str:
    verdicts: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
    for name, rate in data.win_rates.items():
        if name != headline_name:
            verdicts[_verdict(rate)].append(scorer_title(name))
    words = {"better": "better", "worse": "worse", "open": "neither surely better nor surely worse"}
    said = [f"{_join(names)} {'finds' if len(names) == 1 else 'find'} it {words[verdict]}"
            for verdict, names in verdicts.items() if names]
    return f" Of the other judges, {'; '.join(said)}." if said else ""


def _verdict(rate: WinRate) -> str:
    if rate.ci_low is not None and rate.ci_low > 0.5:
        return "better"
    return "worse" if rate.ci_high is not None and rate.ci_high < 0.5 else "open"


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
