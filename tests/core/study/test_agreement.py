"""Krippendorff's own example, closed forms, and judges by hand."""

import numpy as np
import pytest

from hgdpo_core.errors import InputError
from hgdpo_core.study.agreement import alpha_estimate, judge_agreement, krippendorff_alpha

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: 4 observers, 12 units, 5 categories
EXAMPLE = ["1 2 3 3 2 1 4 1 2 . . .",
           "1 2 3 3 2 2 4 1 2 5 . 3",
           ". 3 3 3 2 3 4 2 2 5 1 .",
           "1 2 3 3 2 4 4 1 2 5 1 ."]
RATINGS = [(observer, unit, value) for observer, line in enumerate(EXAMPLE)
           for unit, value in enumerate(line.split()) if value != "."]
OBSERVERS, UNITS, VALUES = ([str(rating[column]) for rating in RATINGS] for column in range(3))


def reference_alpha(units, values):
    """From the matrix of coincidences, as Krippendorff computes it by hand."""
    categories = sorted(set(values))
    coincidences = dict.fromkeys([(a, b) for a in categories for b in categories], 0.0)
    for unit in set(units):
        rated = [value for name, value in zip(units, values, strict=True) if name == unit]
        for i, a in enumerate(rated):
            for j, b in enumerate(rated):
                if i != j:
                    coincidences[a, b] += 1 / (len(rated) - 1)
    n = sum(coincidences.values())
    sums = {a: sum(coincidences[a, b] for b in categories) for a in categories}
    same = sum(coincidences[a, a] for a in categories)
    chance = sum(total * (total - 1) for total in sums.values())
    return ((n - 1) * same - chance) / (n * (n - 1) - chance)


# --- alpha


def test_krippendorffs_own_example():
    assert krippendorff_alpha(UNITS, VALUES) == pytest.approx(0.743, abs=5e-4)


def test_against_the_matrix_of_coincidences():
    rng = np.random.default_rng(0)
    for _ in range(20):
        units, values = rng.integers(0, 8, 40).astype(str), rng.integers(0, 3, 40).astype(str)
        assert krippendorff_alpha(units, values) == pytest.approx(reference_alpha(units, values))


def test_two_observers_by_hand():
    """Ten units with four disagreements; of the twenty values six are 1: 1 - 19 * 4 / (14 * 6)."""
    first, second = "0100000000", "1110010010"
    units = [str(i) for i in range(10)] * 2
    assert krippendorff_alpha(units, list(first + second)) == pytest.approx(1 - 76 / 84)


def test_agreement_and_its_opposite():
    assert krippendorff_alpha(["a", "a", "b", "b"], ["x", "x", "y", "y"]) == 1
    assert krippendorff_alpha(["a", "a", "b", "b"], ["x", "y", "x", "y"]) == -0.5  # 1 - 3 * 2 * 2 / (16 - 8)


@pytest.mark.parametrize(("units", "values"), [([], []), (["a", "b"], ["x", "y"]), (["a", "a", "b", "b"], ["x"] * 4)])
def test_nothing_to_compare(units, values):
    assert krippendorff_alpha(units, values) is None


def test_an_interval_holds_its_value():
    estimate = alpha_estimate(UNITS, VALUES, OBSERVERS, UNITS)
    assert estimate.value == pytest.approx(0.743, abs=5e-4)
    assert estimate.ci_low < estimate.value < estimate.ci_high <= 1


def test_no_interval_for_one_person_or_one_prompt():
    assert alpha_estimate(UNITS, VALUES, ["p"] * len(UNITS), UNITS).ci_low is None
    assert alpha_estimate(UNITS, VALUES, OBSERVERS, ["q"] * len(UNITS)).ci_low is None
    two = alpha_estimate(["a", "a", "b", "b"], list("xxyy"), list("pqpq"), list("aabb"))
    assert (two.value, two.ci_low) == (1, None)  # without one of them nothing is left to compare


def test_lengths_that_differ_are_refused():
    with pytest.raises(InputError, match="got 4, 4, 3 and 4"):
        alpha_estimate(list("aabb"), list("xxyy"), list("pqp"), list("aabb"))


def simulated_alpha(rng, people, pairs, spread):
    """An estimate for people who see the same pairs, each with its own chance of the first image."""
    chance = 1 / (1 + np.exp(-rng.normal(0, spread, pairs)))
    chosen = rng.random((people, pairs)) < chance
    person, pair = (axis.ravel().astype(str) for axis in np.indices(chosen.shape))
    return alpha_estimate(pair, chosen.ravel().astype(int).astype(str), person, pair)


def test_the_interval_of_alpha_covers():
    """40 pairs by 8 people; the true alpha is that of very many people and pairs."""
    rng = np.random.default_rng(0)
    chance = 1 / (1 + np.exp(-rng.normal(0, 1.5, 1_000_000)))
    true = 1 - 2 * np.mean(chance * (1 - chance)) / (2 * chance.mean() * (1 - chance.mean()))
    estimates = [simulated_alpha(rng, 8, 40, 1.5) for _ in range(100)]
    assert np.mean([one.value for one in estimates]) == pytest.approx(true, abs=0.02)
    assert np.mean([one.ci_low <= true <= one.ci_high for one in estimates]) >= 0.9


# --- judges


def test_a_judge_by_hand():
    """Two pairs, three people: p is chosen second, second, first; q first, neither, neither."""
    choices = np.array([1, 1, -1, -1, 0, 0])
    margins = np.array([0.5] * 3 + [0.25] * 3)
    people, pairs = list("xyzxyz"), list("pppqqq")
    agreement = judge_agreement("hps", margins, choices, pairs, people, pairs)
    assert (agreement.votes.wins, agreement.votes.losses, agreement.votes.ties) == (2, 2, 2)
    assert (agreement.pairs.wins, agreement.pairs.losses, agreement.pairs.ties) == (1, 1, 0)
    opposite = judge_agreement("hps", -margins, choices, pairs, people, pairs)
    assert (opposite.pairs.wins, opposite.pairs.losses) == (1, 1)


def test_split_majorities_equal_scores_and_missing_ones():
    choices = np.array([1, -1, 1, 1, 1])
    margins = np.array([0.5, 0.5, 0.0, np.nan, 2.0])
    agreement = judge_agreement("hps", margins, choices, list("ppqrs"), list("xyxxx"), list("ppqrs"))
    assert (agreement.votes.wins, agreement.votes.losses, agreement.votes.ties) == (2, 1, 1)
    assert (agreement.pairs.wins, agreement.pairs.losses, agreement.pairs.ties) == (1, 0, 2)


def test_a_judge_without_scores():
    agreement = judge_agreement("hps", np.full(3, np.nan), np.ones(3), list("pqr"), list("xyz"), list("pqr"))
    assert agreement.votes.n == agreement.pairs.n == 0 and agreement.votes.rate is None


def test_pairs_of_one_prompt_are_one_cluster():
    """Four prompts whose three pairs agree wholly are four clusters, not twelve pairs."""
    choices, margins = np.repeat([1, 1, 1, -1], 3), np.ones(12)
    pairs = [str(i) for i in range(12)]
    people = list("xyz") * 4
    clustered = judge_agreement("hps", margins, choices, pairs, people, [str(i // 3) for i in range(12)]).pairs
    apart = judge_agreement("hps", margins, choices, pairs, people, pairs).pairs
    assert clustered.rate == apart.rate == 0.75
    assert clustered.ci_high - clustered.ci_low > 1.5 * (apart.ci_high - apart.ci_low)
