"""Each check warns about a training that fails in its way, and not about one that does not."""

from typing import Any

import numpy as np
import pytest
from small_runs import SmallWorld

from hgdpo_core.metrics import WinRate, win_rate
from hgdpo_core.scorers import load_scorer
from hgdpo_core.statistics.checks import (
    COLLAPSE_RISE,
    MIN_ROWS,
    SATURATED_ACCURACY,
    CollapseWatch,
    check_collapse,
    check_defects,
    check_run,
    check_scorers,
    check_stall,
    check_variety,
)
from hgdpo_core.statistics.diversity import thumbnail, variety_change
from hgdpo_core.statistics.intervals import Estimate, defect_change

SAME = Estimate(0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def world() -> SmallWorld:
    return SmallWorld(pairs=6, held_out=12, steps=5)


@pytest.fixture(scope="module")
def judge(world):
    """Win rate of images over the target's by the built-in scorer."""
    scorer = load_scorer("pickscore", source="figures")
    before = scorer.score(world.target_images, world.prompts)
    return lambda images: win_rate(scorer.score(images, world.prompts), before)


@pytest.fixture(scope="module")
def healthy(world):
    """Correct images against headless ones, at the demo's learning rate."""
    return world.train(world.images([None] * 6), world.images(["no_head"] * 6), max_steps=MIN_ROWS, batch_size=3)


def rises(log):
    last = {name: np.mean([row[name] for row in log[-MIN_ROWS // 2:]]) for name in log[0]}
    return [last[f"{side}_error"] / last[f"reference_{side}_error"] - 1 for side in ("winner", "loser")]


def test_a_learning_rate_a_hundred_times_too_large_collapses(world):
    messages = []
    result, _ = world.train(world.images([None] * 6), world.images(["no_head"] * 6), max_steps=MIN_ROWS,
                            batch_size=3, learning_rate=3e-2, on_log=CollapseWatch(messages.append))
    assert min(rises(result.log)) > 5 * COLLAPSE_RISE
    warning = check_collapse(result.log)
    assert warning is not None and warning.guard == "collapse"
    for words in (f"winners is {100 * rises(result.log)[0]:.0f} %", "dpo.learning_rate"):
        assert words in warning.message
    assert warning.as_dict() == {"guard": "collapse", "message": warning.message}
    assert messages == [warning.message]


def test_a_healthy_run_raises_no_warning(healthy, judge):
    result, images = healthy
    assert abs(rises(result.log)[0]) < COLLAPSE_RISE
    assert check_collapse(result.log) is None
    assert check_scorers({"pickscore": judge(images), "other": judge(images)}, "pickscore") is None


def test_a_run_on_random_labels_stalls(world, judge):
    """Winner and loser are two correct images of the same figure: nothing to learn, everything to memorise."""
    result, images = world.train(world.images([None] * 6), world.images([None] * 6, seed=100), max_steps=20,
                                 batch_size=3, learning_rate=2e-3)
    rates = {"pickscore": judge(images)}
    warning = check_stall(result.log, rates)
    assert warning is not None and warning.guard == "stall"
    assert f"pickscore {100 * rates['pickscore'].rate:.1f} %" in warning.message
    assert [a.guard for a in check_run(result.log, rates, {}, SAME, "pickscore") if a.guard == "stall"] == ["stall"]


def test_a_scorer_that_prefers_fog_is_hacked(world, judge):
    """The pools are ranked by low contrast, and an independent scorer sees the effect."""
    right = world.images([None] * 6)
    fog = (right * 0.35 + 0.65 * 190).astype(np.uint8)
    result, images = world.train(fog, right, max_steps=16, batch_size=3, learning_rate=5e-3)
    rates = {"fog": win_rate(-images.std(axis=(1, 2, 3)), -world.target_images.std(axis=(1, 2, 3))),
             "pickscore": judge(images)}
    assert rates["fog"].ci_low > 0.5
    warning = check_scorers(rates, "fog")
    assert warning is not None and warning.guard == "parted_judges" and "pickscore" in warning.message
    variety = variety_change(*(np.stack([thumbnail(image) for image in side])[:, None]
                               for side in (images, world.target_images)))
    alike = check_variety(rates, variety)
    assert alike is not None and alike.guard == "lost_variety"  # in fog all things look alike
    assert check_run(result.log, rates, {}, variety, "fog")[-2:] == [alike, warning]
    assert warning not in check_run(result.log, rates, {}, variety, None)  # not in the evaluation


# --- where the lines are drawn, with numbers


def log(rows: int = MIN_ROWS, **columns: float) -> list[dict[str, Any]]:
    base = {"winner_error": 0.1, "loser_error": 0.1, "reference_winner_error": 0.1, "reference_loser_error": 0.1}
    return [{"step": float(i), "implicit_accuracy": 0.8, **base, **columns} for i in range(rows)]


def rate(percent: int, n: int = 400) -> WinRate:
    return WinRate.from_counts(n * percent // 100, n - n * percent // 100, 0)


def test_collapse_needs_both_errors_and_enough_rows():
    assert check_collapse(log(winner_error=0.11, loser_error=0.11)) is not None
    assert check_collapse(log(winner_error=0.1, loser_error=0.2)) is None  # what DPO is meant to do
    assert check_collapse(log(winner_error=0.2, loser_error=0.1)) is None
    assert check_collapse(log(MIN_ROWS - 1, winner_error=0.2, loser_error=0.2)) is None
    assert check_collapse([{"step": 1.0, "loss": 0.5}] * MIN_ROWS) is None  # a log without these columns
    assert check_collapse([]) is None


def test_collapse_is_judged_at_the_end():
    bad, good = log(50, winner_error=0.2, loser_error=0.2), log(50)
    assert check_collapse(bad + good) is None and check_collapse(good + bad) is not None


def test_a_collapse_under_way_is_told_once():
    messages = []
    watch = CollapseWatch(messages.append)
    for row in log(5 * MIN_ROWS) + log(20 * MIN_ROWS, winner_error=0.2, loser_error=0.2):
        watch(row)
    assert len(messages) == 1 and f"after {6 * MIN_ROWS} log rows" in messages[0]


def test_stall_needs_saturation_and_no_gain_by_any_scorer():
    full, early = log(implicit_accuracy=SATURATED_ACCURACY), log(implicit_accuracy=SATURATED_ACCURACY - 0.01)
    assert check_stall(full, {"a": rate(50), "b": rate(45)}) is not None
    assert check_stall(full, {"a": rate(50), "b": rate(60)}) is None
    assert check_stall(early, {"a": rate(50)}) is None
    assert check_stall(full, {}) is None
    assert check_stall(full, {"a": WinRate.from_counts(0, 0, 9)}) is None  # no prompt was decided


@pytest.mark.parametrize(("independent", "words"), [
    (rate(40), "sees a loss"), (rate(50), "sees no gain"), (rate(58), None), (rate(50, n=8), None),
    (WinRate.from_counts(0, 0, 9), None)])
def test_scorers_disagree_only_if_their_intervals_do(independent, words):
    warning = check_scorers({"trained": rate(70), "other": independent}, "trained")
    assert (warning is None) if words is None else (warning is not None and words in warning.message)


def test_scorers_without_a_gain_or_without_others_raise_no_warning():
    assert check_scorers({"trained": rate(50), "other": rate(30)}, "trained") is None
    assert check_scorers({"trained": rate(80)}, "trained") is None
    assert check_scorers({"other": rate(30)}, "trained") is None


def test_defects_that_fall_or_may_fall_raise_no_warning():
    many, few = np.tile([-1.0, 1.0], 50), np.ones(100)
    assert check_defects({"t": rate(80)}, {"i": defect_change(few, many, 0.0)}, "t") is None
    assert check_defects({"t": rate(80)}, {"i": defect_change(many, many, 0.0)}, "t") is None
    risen = {"i": defect_change(many, few, 0.0)}
    assert check_defects({"t": rate(50)}, risen, "t") is None
    warning = check_defects({"t": rate(80)}, risen, "t")
    assert warning is not None and "0.0 % before, 50.0 % after" in warning.message
    assert check_run([], {"t": rate(80)}, risen, SAME, "t") == [warning]


def test_lost_variety_needs_a_gain_and_a_clear_loss():
    lost = Estimate(-20.0, -25.0, -15.0)
    warning = check_variety({"a": rate(70), "b": rate(50)}, lost)
    assert warning is not None and "a prefer" in warning.message and "20 % less" in warning.message
    assert check_variety({"a": rate(50)}, lost) is None
    for change in (Estimate(-20.0, -35.0, -5.0), Estimate(20.0, 15.0, 25.0), Estimate(-20.0, None, None),
                   Estimate(None, None, None)):
        assert check_variety({"a": rate(70)}, change) is None
