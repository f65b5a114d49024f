"""Checks for tunings that failed although some of their numbers look good.

Preference training fails silently: the loss falls and the implicit accuracy rises whether the model improves or not.
Each check compares two quantities that should agree, and returns a warning with the numbers it is based on, or None,
also if the log has too few rows or an evaluation is missing. The thresholds below state their reasons.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from hgdpo_core.metrics import WinRate
from hgdpo_core.statistics.intervals import DefectChange, Estimate

MIN_ROWS = 10  # fewer rows would be single batches
WINDOW_FRACTION = 0.2  # of the rows, at the end of the log, which are averaged
COLLAPSE_RISE = 0.05
"""Relative rise of BOTH errors above the reference's. Some rise is normal: Diffusion-DPO increases the loser's error at
the cost of a little of the winner's. In successful runs of the figures setting the winner's error ended within 1 % of
the reference's and the loser's 1 to 3 % above; a learning rate a hundred times too large ended at 200 % for both."""
SATURATED_ACCURACY = 0.9
"""Implicit accuracy at which hardly any pair is left to learn from. Alone it is no evidence: runs of the figures
setting end at 0.85 to 0.90 with win rates above 80 %, runs on random labels at 1.00 with 50 %."""

LOST_VARIETY_PERCENT = -10.0
"""How much less the tuned model's images differ from each other: about where this becomes visible. In a successful run
of the figures setting the spread changed by under 1 %; tuned for a scorer that prefers fog, it fell by over 15 %."""


@dataclass(frozen=True)
class RunWarning:
    """The result of a check. `guard` (persisted) is a stable name of the check, `message` is for people."""

    guard: str
    message: str

    def as_dict(self) -> dict[str, str]:
        """As `summary.json` holds it under `warnings`."""
        return asdict(self)


LogCheck = Callable[[Sequence[Mapping[str, float]], Mapping[str, WinRate]], RunWarning | None]
"""A check of a training's log and its win rates, as objectives declare them."""


def check_run(log: Sequence[Mapping[str, float]], win_rates: Mapping[str, WinRate],
              defects: Mapping[str, DefectChange], variety_change: Estimate, training_scorer: str | None,
              log_checks: Sequence[LogCheck] | None = None) -> list[RunWarning]:
    """All warnings of a finished run: its training's log, the evaluation by every scorer, the spread of the images.

    `log_checks` are the objective's, by default those of preference training. `training_scorer` is the name, among
    `win_rates`, of the scorer that ranked the training pools; None if the evaluation does not include it.
    """
    checks = PREFERENCE_CHECKS if log_checks is None else log_checks
    warnings = [*(check(log, win_rates) for check in checks), check_variety(win_rates, variety_change)]
    if training_scorer is not None:
        warnings += [check_scorers(win_rates, training_scorer), check_defects(win_rates, defects, training_scorer)]
    return [warning for warning in warnings if warning is not None]


def check_collapse(log: Sequence[Mapping[str, float]]) -> RunWarning | None:
    """Winner and loser errors both rise above the reference: the loss falls only because losers get worse faster.

    Reads the columns `winner_error`, `loser_error` and their `reference_` counterparts of `prepare_dpo`'s log.
    """
    rises = [_rise(log, side) for side in ("winner", "loser")]
    if any(rise is None or rise <= COLLAPSE_RISE for rise in rises):
        return None
    winner, loser = (f"{100 * rise:.0f} %" for rise in rises if rise is not None)
    return RunWarning(
        "collapse", f"Collapse: after {len(log)} log rows the denoising error of winners is {winner} above "
        f"the reference's, and that of losers {loser}. The model unlearns both. Lower "
        "dpo.learning_rate or dpo.max_steps, or raise dpo.beta.")


def check_warm_up(log: Sequence[Mapping[str, float]]) -> RunWarning | None:
    """The training ended while the learning rate was still growing, so its setting was hardly ever in effect."""
    if len(log) < 2 or "learning_rate" not in log[0] or log[-1]["learning_rate"] <= log[-2]["learning_rate"]:
        return None
    return RunWarning(
        "warm_up", f"Warm-up: the training ended at step {log[-1]['step']:.0f}, inside its warm-up, at a learning rate "
        f"of {log[-1]['learning_rate']:.1e}. It has learned little: use more prompts, more epochs, or fewer "
        "warmup_steps.")


class CollapseWatch:
    """Called with each row of a running training, it warns once, as soon as it collapses: days may be left."""

    def __init__(self, warn: Callable[[str], object]):
        self._warn, self._log, self._warned = warn, [], False

    def __call__(self, row: Mapping[str, float]) -> None:
        self._log.append(row)
        if not self._warned and len(self._log) % MIN_ROWS == 0 and (warning := check_collapse(self._log)) is not None:
            self._warned = True
            self._warn(warning.message)


def check_stall(log: Sequence[Mapping[str, float]], win_rates: Mapping[str, WinRate]) -> RunWarning | None:
    """The implicit accuracy on the training pairs is saturated, but no scorer sees a gain on held-out prompts."""
    accuracy = _latest(log, "implicit_accuracy")
    decided = {name: rate for name, rate in win_rates.items() if rate.ci_low is not None}
    if accuracy is None or accuracy < SATURATED_ACCURACY or not decided or any(map(_is_gain, decided.values())):
        return None
    return RunWarning(
        "stall", f"Stall: the implicit accuracy on the training pairs reached {100 * accuracy:.0f} %, but no "
        f"scorer sees a gain on held-out prompts ({_describe(decided)}). The LoRA memorises its "
        "triplets: use more prompts or fewer dpo.max_steps.")


PREFERENCE_CHECKS: tuple[LogCheck, ...] = (
    lambda log, _: check_collapse(log), check_stall, lambda log, _: check_warm_up(log))


def check_scorers(win_rates: Mapping[str, WinRate], training_scorer: str) -> RunWarning | None:
    """The scorer that ranked the pools sees a gain where an independent one sees a loss, or clearly less of a gain.

    "Clearly": its interval is not above one half and ends below the start of the training scorer's.
    """
    trained = win_rates.get(training_scorer)
    if trained is None or trained.ci_low is None or not _is_gain(trained):
        return None
    apart = {name: rate for name, rate in win_rates.items() if name != training_scorer and not _is_gain(rate)
             and rate.ci_high is not None and rate.ci_high < trained.ci_low}
    if not apart:
        return None
    word = "a loss" if any(rate.ci_high is not None and rate.ci_high < 0.5 for rate in apart.values()) else "no gain"
    return RunWarning(
        "parted_judges", f"The scorers disagree: the one used in training prefers the tuned "
        f"model ({_describe({training_scorer: trained})}), but an independent scorer sees "
        f"{word} ({_describe(apart)}). The LoRA may satisfy its scorer instead of people: "
        "look at the images, train for fewer steps, lower evaluation.lora_weight, or rank by "
        "another scorer.")


def check_defects(win_rates: Mapping[str, WinRate], defects: Mapping[str, DefectChange],
                  training_scorer: str) -> RunWarning | None:
    """The training scorer sees a gain while the fraction of defective images clearly rises."""
    trained = win_rates.get(training_scorer)
    risen = {name: change for name, change in defects.items() if change.ci_low is not None and change.ci_low > 0}
    if trained is None or not _is_gain(trained) or not risen:
        return None
    rises = "; ".join(f"{name}: {100 * change.target:.1f} % before, {100 * change.tuned:.1f} % after"
                      for name, change in risen.items())
    return RunWarning(
        "more_defects", f"More defects: {training_scorer}, which was used in training, prefers the tuned "
        f"model, but more of its images are defective ({rises}). Look at the images, train "
        "for fewer steps, or lower evaluation.lora_weight.")


def check_variety(win_rates: Mapping[str, WinRate], change: Estimate) -> RunWarning | None:
    """A scorer sees a gain, but the images clearly differ less from each other than the target's.

    `change` is `variety_change`'s: percent of the target's spread.
    """
    gains = [name for name, rate in win_rates.items() if _is_gain(rate)]
    if not gains or change.value is None or change.ci_high is None or change.ci_high > LOST_VARIETY_PERCENT:
        return None
    return RunWarning(
        "lost_variety", f"Lost variety: {' and '.join(gains)} {'prefers' if len(gains) == 1 else 'prefer'} the "
        f"tuned model, but its images differ {-change.value:.0f} % less from each other than the target's. The gain "
        "may be one look for everything: look at the images, train for fewer steps, or lower evaluation.lora_weight.")


def _is_gain(rate: WinRate) -> bool:
    return rate.ci_low is not None and rate.ci_low > 0.5


def _describe(rates: Mapping[str, WinRate]) -> str:
    values = {name: (rate.rate or 0.0, rate.ci_low or 0.0, rate.ci_high or 0.0) for name, rate in rates.items()}
    return "; ".join(f"{name} {100 * rate:.1f} %, interval {100 * low:.1f} to {100 * high:.1f} %"
                     for name, (rate, low, high) in values.items())


def _latest(log: Sequence[Mapping[str, float]], column: str) -> float | None:
    """Mean of a column over the last fifth of the log; None if the log is too short or has no such column."""
    values = [row[column] for row in log if column in row]
    window = max(MIN_ROWS // 2, round(WINDOW_FRACTION * len(values)))
    return sum(values[-window:]) / len(values[-window:]) if len(values) >= MIN_ROWS else None


def _rise(log: Sequence[Mapping[str, float]], side: str) -> float | None:
    """Relative rise of the policy's error above the reference's on the same samples and noise."""
    policy, reference = _latest(log, f"{side}_error"), _latest(log, f"reference_{side}_error")
    return None if policy is None or not reference else policy / reference - 1
