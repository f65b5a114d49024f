"""Who sees what: each pair by as many people, on both sides as often; repeats swapped; checks."""

from collections import Counter
from itertools import pairwise

import pytest

from hgdpo_core.config.base import validate
from hgdpo_core.config.study import StudyConfig
from hgdpo_core.errors import ConfigError
from hgdpo_core.study.plan import count_people, count_trials, plan_trials, shuffled


def config(**settings):
    return StudyConfig.model_validate({"sources": ("evaluations/a",), **settings})


def questions(trials):
    return [trial for trial in trials if trial.kind == "question"]


@pytest.mark.parametrize(("pairs", "each", "people"), [(12, 12, 5), (40, 40, 5), (100, 40, 5), (37, 10, 8), (3, 40, 4),
                                                       (1, 1, 3), (400, 40, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_pair_is_seen_by_as_many_people_and_on_both_sides_as_often(pairs, each, people, seed):
    settings = config(questions=each, people=people, seed=seed)
    seen, swapped = Counter(), Counter()
    for number in range(count_people(pairs, settings)):
        trials = questions(plan_trials(pairs, settings, number))
        assert len({trial.pair for trial in trials}) == len(trials) == min(each, pairs), "no pair twice"
        seen.update(trial.pair for trial in trials)
        swapped.update(trial.pair for trial in trials if trial.swapped)
        counts = [seen[pair] for pair in range(pairs)]
        assert max(counts) - min(counts) <= 1, "at any time, whichever place comes next"
        assert all(abs(2 * swapped[pair] - seen[pair]) <= 1 for pair in range(pairs))
    assert all(seen[pair] >= people for pair in range(pairs))
    assert abs(2 * swapped.total() - seen.total()) <= pairs / 2 + 1


def test_one_person_sees_the_first_model_on_both_sides_as_often():
    for number in range(6):
        trials = questions(plan_trials(40, config(), number))
        assert sum(trial.swapped for trial in trials) == 20


def test_repeats_are_swapped_and_come_later():
    for number in range(20):
        trials = plan_trials(40, config(repeats=0.1), number)
        first = {trial.pair: (place, trial) for place, trial in enumerate(trials) if trial.kind == "question"}
        repeats = [(place, trial) for place, trial in enumerate(trials) if trial.kind == "repeat"]
        assert len(repeats) == len({trial.pair for _, trial in repeats}) == 4
        for place, trial in repeats:
            before, original = first[trial.pair]
            assert place > before + 1 and trial.swapped != original.swapped


def test_checks_have_a_picture_on_either_side_and_are_never_first():
    sides, pictures = Counter(), Counter()
    for number in range(40):
        trials = plan_trials(40, config(checks=0.1), number)
        checks = [trial for trial in trials if trial.kind == "check"]
        assert len(checks) == 4 and trials[0].kind == "question"
        sides.update(trial.swapped for trial in checks)
        pictures.update(trial.picture for trial in checks)
        assert {trial.picture for trial in trials if trial.kind != "check"} == {None}
    assert sides == {True: 80, False: 80} and min(pictures.values()) > 50


def test_checks_show_pairs_that_the_participant_does_not_compare_where_there_are_others():
    trials = plan_trials(100, config(questions=40), 3)
    compared = {trial.pair for trial in questions(trials)}
    assert not compared & {trial.pair for trial in trials if trial.kind == "check"}


def test_counts():
    assert count_trials(40, config()) == 44 and count_trials(12, config()) == 14
    assert count_trials(12, config(repeats=0, checks=0)) == 12
    assert count_people(40, config()) == 5 and count_people(100, config()) == 13 and count_people(1, config()) == 5


def test_orders_differ_between_people_and_seeds_and_are_the_same_again():
    orders = [tuple(plan_trials(40, config(seed=seed), number)) for seed in (0, 1) for number in range(5)]
    assert len(set(orders)) == 10
    assert plan_trials(40, config(), 3) == plan_trials(40, config(), 3)
    assert all(a != b for a, b in pairwise(orders))


def test_the_plan_is_the_same_in_every_version():
    """A server that is updated in the middle of a study must know its trials again."""
    assert shuffled(range(8), 0, "golden") == [7, 2, 1, 3, 6, 4, 5, 0]
    trials = plan_trials(4, config(), 1)
    assert [(trial.pair, trial.kind[0], trial.swapped) for trial in trials] == [
        (1, "q", False), (0, "q", True), (2, "q", False), (0, "r", False), (3, "q", True), (0, "c", True)]


@pytest.mark.parametrize(("settings", "named"), [
    ({"people": 0}, "people"), ({"questions": 0}, "questions"), ({"pairs": 0}, "pairs"), ({"repeats": 0.6}, "repeats"),
    ({"checks": -0.1}, "checks"), ({"seed": -1}, "seed"), ({"question": ""}, "question"), ({"sources": ()}, "sources"),
    ({"colour": 1}, "colour")])
def test_settings_out_of_range_are_named(settings, named):
    with pytest.raises(ConfigError, match=named):
        validate(StudyConfig, {"sources": ("a",), **settings})
