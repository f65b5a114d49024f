"""Warnings about a tuning that went wrong while some of its numbers look fine.

Preference training fails quietly: the loss falls and the implicit accuracy rises whether the model gets better or
not. Each guard compares two things that should go together. A guard warns and stops nothing: the numbers it read
are in its message, and the thresholds below say why they are where they are. A training log has too few rows, or an
evaluation is missing: then the guard is silent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from hgdpo_core.metrics import WinRate
from hgdpo_core.statistics.intervals import DefectChange, Estimate

MIN_ROWS = 10  # a verdict on fewer rows would be one on single batches
WINDOW_SHARE = 0.2  # of the rows, at the end of the log: what training has come to, smoothed
COLLAPSE_RISE = 0.05
"""Share by which BOTH errors stand above the reference's. Some rise is normal: Diffusion-DPO pays for the loser's
larger error with a little of the winner's. In runs of the figures world that win, the winner's error ended within 1 %
of the reference's and the loser's 1 to 3 % above; a learning rate a hundred times too large ended at 200 % for both."""
SATURATED_ACCURACY = 0.9
"""Implicit accuracy at which hardly any pair is left to learn from. By itself it says nothing: runs of the figures
world end at 0.85 to 0.90 with win rates above 80 %, runs on random labels at 1.00 with one half."""

LOST_VARIETY_PERCENT = -10.0
"""How much less the tuned model's images differ from each other: a share that the eye begins to see. In a run of the
figures world that won honestly the spread moved by under 1 %; tuned for a judge that loves fog, it lost over 15 %."""


@dataclass(frozen=True)
class Alarm:
    """What a guard saw. `guard` is a stable word for programs, `message` is for people."""

    guard: str
    message: str

    def as_dict(self) -> dict[str, str]:
        """As `summary.json` holds it under `warnings`."""
        return asdict(self)


LogCheck = Callable[[Sequence[Mapping[str, float]], Mapping[str, WinRate]], Alarm | None]
"""Of a training's log and the win rates behind it: what an objective declares."""


def check_run(log: Sequence[Mapping[str, float]], win_rates: Mapping[str, WinRate],
              defects: Mapping[str, DefectChange], variety_change: Estimate, training_judge: str | None,
              log_checks: Sequence[LogCheck] | None = None) -> list[Alarm]:
    """All alarms of a finished run: its training's log, the evaluation by every scorer, and the spread of the images.

    `log_checks` are the objective's, by default those of preference training. `training_judge` is the name, among
    `win_rates`, of the scorer that ranked the training pools; None if it was not asked again.
    """
    checks = PREFERENCE_CHECKS if log_checks is None else log_checks
    alarms = [*(check(log, win_rates) for check in checks), check_variety(win_rates, variety_change)]
    if training_judge is not None:
        alarms += [check_judges(win_rates, training_judge), check_defects(win_rates, defects, training_judge)]
    return [alarm for alarm in alarms if alarm is not None]


def check_collapse(log: Sequence[Mapping[str, float]]) -> Alarm | None:
    """Winner and loser errors both rise against the reference: the loss falls only because losers get worse faster.

    Reads the columns `winner_error`, `loser_error` and their `reference_` counterparts of `train_dpo`'s log.
    """
    rises = [_rise(log, side) for side in ("winner", "loser")]
    if any(rise is None or rise <= COLLAPSE_RISE for rise in rises):
        return None
    winner, loser = (f"{100 * rise:.0f} %" for rise in rises if rise is not None)
    return Alarm("collapse", f"Collapse: after {len(log)} log rows the denoising error of winners is {winner} above "
                             f"the reference's, and that of losers {loser}. The model unlearns both. Lower "
                             "dpo.learning_rate or dpo.max_steps, or raise dpo.beta.")


class CollapseWatch:
    """Called with each row of a training under way, it warns once, as soon as a collapse shows: days may be left."""

    def __init__(self, warn: Callable[[str], object]):
        self._warn, self._log, self._told = warn, [], False

    def __call__(self, row: Mapping[str, float]) -> None:
        self._log.append(row)
        if self._told or len(self._log) % MIN_ROWS:
            return
        alarm = check_collapse(self._log)
        if alarm is not None:
            self._told = True
            self._warn(alarm.message)


def check_stall(log: Sequence[Mapping[str, float]], win_rates: Mapping[str, WinRate]) -> Alarm | None:
    """The training pairs are told apart almost always, yet no scorer sees a gain on held-out prompts."""
    accuracy = _latest(log, "implicit_accuracy")
    decided = {name: rate for name, rate in win_rates.items() if rate.ci_low is not None}
    if accuracy is None or accuracy < SATURATED_ACCURACY or not decided or any(map(_is_gain, decided.values())):
        return None
    seen = "; ".join(f"{name} {_describe(rate)}" for name, rate in decided.items())
    return Alarm("stall", f"Stall: the implicit accuracy on the training pairs reached {100 * accuracy:.0f} %, but no "
                          f"judge sees a gain on held-out prompts ({seen}). The LoRA memorises its triplets: use more "
                          "prompts or fewer dpo.max_steps.")


PREFERENCE_CHECKS: tuple[LogCheck, ...] = (lambda log, _: check_collapse(log), check_stall)


def check_judges(win_rates: Mapping[str, WinRate], training_judge: str) -> Alarm | None:
    """The judge that ranked the pools sees a gain where an independent one sees a loss, or surely much less.

    "Surely": its interval does not lie above one half and ends below where the training judge's begins.
    """
    trained = win_rates.get(training_judge)
    if trained is None or trained.ci_low is None or not _is_gain(trained):
        return None
    others = {name: rate for name, rate in win_rates.items() if name != training_judge and rate.ci_high is not None}
    apart = {name: rate for name, rate in others.items()
             if not _is_gain(rate) and rate.ci_high is not None and rate.ci_high < trained.ci_low}
    if not apart:
        return None
    seen = "; ".join(f"{name} {_describe(rate)}" for name, rate in apart.items())
    word = "a loss" if any(rate.ci_high is not None and rate.ci_high < 0.5 for rate in apart.values()) else "no gain"
    return Alarm("parted_judges", f"The judges part ways: {training_judge}, which ranked the training pools, prefers "
                                  f"the tuned model ({_describe(trained)}), but an independent judge sees {word} "
                                  f"({seen}). The LoRA may please its judge instead of people: look at the pictures, "
                                  "lower dpo.max_steps or evaluation.lora_weight, or rank by another judge.")


def check_defects(win_rates: Mapping[str, WinRate], defects: Mapping[str, DefectChange],
                  training_judge: str) -> Alarm | None:
    """The training judge sees a gain while the share of defective images surely rises."""
    trained = win_rates.get(training_judge)
    risen = {name: change for name, change in defects.items() if change.ci_low is not None and change.ci_low > 0}
    if trained is None or not _is_gain(trained) or not risen:
        return None
    seen = "; ".join(f"{name}: {100 * change.target:.1f} % before, {100 * change.tuned:.1f} % after"
                     for name, change in risen.items())
    return Alarm("more_defects", f"More defects: {training_judge}, which ranked the training pools, prefers the tuned "
                                 f"model, but more of its images are defective ({seen}). Look at the pictures, lower "
                                 "dpo.max_steps or evaluation.lora_weight.")


def check_variety(win_rates: Mapping[str, WinRate], change: Estimate) -> Alarm | None:
    """A scorer sees a gain, but the images surely differ less from each other than the target's did.

    `change` is `variety_change`'s: percent of the target's spread.
    """
    gains = [name for name, rate in win_rates.items() if _is_gain(rate)]
    if not gains or change.value is None or change.ci_high is None or change.ci_high > LOST_VARIETY_PERCENT:
        return None
    return Alarm("lost_variety", f"Lost variety: {' and '.join(gains)} prefer the tuned model, but its images differ "
                                 f"{-change.value:.0f} % less from each other than the target's. The gain may be one "
                                 "look for everything: look at the pictures, lower dpo.max_steps or "
                                 "evaluation.lora_weight.")


def _is_gain(rate: WinRate) -> bool:
    return rate.ci_low is not None and rate.ci_low > 0.5


def _describe(rate: WinRate) -> str:
    values = (rate.rate or 0.0, rate.ci_low or 0.0, rate.ci_high or 0.0)
    return "{:.1f} %, interval {:.1f} to {:.1f} %".format(*(100 * value for value in values))


def _latest(log: Sequence[Mapping[str, float]], column: str) -> float | None:
    """Mean of a column over the last fifth of the log; None when the log is too short or lacks the column."""
    values = [row[column] for row in log if column in row]
    window = max(MIN_ROWS // 2, round(WINDOW_SHARE * len(values)))
    return sum(values[-window:]) / len(values[-window:]) if len(values) >= MIN_ROWS else None


def _rise(log: Sequence[Mapping[str, float]], side: str) -> float | None:
    """Share by which the policy's error stands above the reference's on the same samples and noise."""
    policy, reference = _latest(log, f"{side}_error"), _latest(log, f"reference_{side}_error")
    return None if policy is None or not reference else policy / reference - 1
