"""Which votes count, and that all are accounted for; a study of four people, by hand; its files and its section."""

import json
import random
from collections import Counter

import pytest
from study_votes import SOURCE, STUDY, make_check, make_pair, make_vote, write_study

from flows.cli import main
from hgdpo_core.errors import InputError
from hgdpo_core.metrics import WinRate
from hgdpo_core.report.people import people, preference, read_people, shown_rates
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import read_table
from hgdpo_core.study import rules
from hgdpo_core.study.findings import evaluate_votes
from hgdpo_core.study.results import read_pairs, write_results
from hgdpo_core.study.tables import results_text, summarise_votes

PAIRS = [make_pair(f"p{i}", scores={"pickscore": (0.1, 0.2), "hps": (0.5, 0.5 if i else 0.1)}) for i in range(4)]
ANN = [make_vote("ann", "p0", "tuned"), make_vote("ann", "p1", "tuned", swapped=True), make_vote("ann", "p2", "target"),
       make_vote("ann", "p3", "tie"), make_vote("ann", "p0", "tuned", kind="repeat", swapped=True),
       make_check("ann", passed=True)]
BOB = [make_vote("bob", "p0", "tuned"), make_vote("bob", "p1", "tuned"), make_vote("bob", "p2", "tuned"),
       make_vote("bob", "p1", "target", kind="repeat", swapped=True), make_check("bob", passed=True),
       make_check("bob", passed=True, pair="p1"), make_check("bob", passed=False, pair="p2")]
EVE = [make_vote("eve", f"p{i}", "target") for i in range(4)] + [
    make_vote("eve", "p0", "tuned", kind="repeat"), make_check("eve", passed=False), make_check("eve", passed=True)]
DAN = [make_vote("dan", "p0", "tuned")]
VOTES = ANN + BOB + EVE + DAN


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def evaluate(votes, pairs=PAIRS):
    return evaluate_votes(STUDY, [SOURCE], votes, pairs)


# --- which votes count


def test_every_vote_is_used_or_has_a_reason():
    results, reasons = evaluate(VOTES)
    assert (results.read, results.used) == (len(VOTES), 8)
    assert results.left_out == {rules.REPEAT: 3, rules.CHECK: 6, rules.EXCLUDED: 4}
    assert len(reasons) == len(VOTES) and reasons.count(None) == results.used
    used = {rate.model: rate.rate for rate in results.rates}["tuned"]
    assert used.n == results.used


def test_the_account_balances_for_any_votes():
    """Broken rows too: unknown pairs, models, kinds and choices, and pairs answered twice."""
    rng = random.Random(0)
    votes = []
    for _ in range(600):
        vote = make_vote(rng.choice("abcdef"), rng.choice(["p0", "p1", "p2", "p3", "unknown"]),
                         rng.choice(["tuned", "target", "tie", "sideways"]),
                         kind=rng.choice(["question"] * 6 + ["repeat", "check", "survey"]),
                         models=rng.choice([("target", "tuned")] * 4 + [("picture", "noise"), ("target", "other")]))
        votes.append(vote)
    results, reasons = evaluate(votes)
    assert results.read == 600 == results.used + sum(results.left_out.values()) == len(reasons)
    assert Counter(reason for reason in reasons if reason) == results.left_out
    assert {rules.REPEAT, rules.UNKNOWN, rules.AGAIN} <= results.left_out.keys()
    assert sum(rate.rate.n for rate in results.rates) == 2 * results.used  # each vote in both directions
    assert len({(vote["participant"], vote["pair"]) for vote, reason in zip(votes, reasons, strict=True)
                if reason is None}) == results.used


def test_the_rule_excludes_who_failed_half_of_their_checks():
    checked = {one.participant: one for one in evaluate(VOTES)[0].participants}
    assert [(one.failed, one.checks, one.excluded) for one in checked.values()] == [
        (0, 1, False), (1, 3, False), (0, 0, False), (1, 2, True)]
    assert list(checked) == ["ann", "bob", "dan", "eve"]


def test_cannot_tell_fails_a_check():
    tie = make_vote("ann", "p0", "tie", kind="check", models=("picture", "noise"))
    assert evaluate([*ANN[:4], tie])[0].excluded[0].participant == "ann"


def test_results_with_and_without_the_excluded_by_hand():
    results = evaluate(VOTES)[0]
    (target, tuned), (_, of_all) = results.rates, results.rates_of_all
    assert (tuned.model, tuned.against, tuned.people, tuned.prompts) == ("tuned", "target", 3, 4)
    assert (tuned.rate.wins, tuned.rate.losses, tuned.rate.ties) == (6, 1, 1) and tuned.rate.rate == 6 / 7
    assert (of_all.rate.wins, of_all.rate.losses, of_all.rate.ties) == (6, 5, 1)
    assert target.rate.rate == pytest.approx(1 / 7)
    assert (1 - target.rate.ci_high, 1 - target.rate.ci_low) == pytest.approx((tuned.rate.ci_low, tuned.rate.ci_high))


def test_repeats_and_sides_are_reported():
    results = evaluate(VOTES)[0]
    assert (results.repeats.repeated, results.repeats.consistent) == (2, 1)  # eve is excluded
    assert (results.left_chosen.wins, results.left_chosen.n) == (2, 8)
    assert results.median_seconds == 2.0


def test_judges_by_hand():
    """PickScore prefers tuned in all pairs; HPS prefers target in p0 and has no opinion elsewhere."""
    hps, pickscore = evaluate(VOTES)[0].judges
    assert (pickscore.votes.wins, pickscore.votes.losses, pickscore.votes.ties) == (6, 1, 1)
    assert (pickscore.pairs.wins, pickscore.pairs.losses, pickscore.pairs.ties) == (2, 0, 2)  # p2: one each; p3: a tie
    assert (hps.votes.wins, hps.votes.losses, hps.votes.ties) == (0, 3, 5)
    assert hps.pairs.n == 4 and hps.pairs.losses == 1


def test_a_judge_that_scored_some_pairs_is_asked_about_those():
    pairs = [make_pair("p0", scores={"pickscore": (0.1, 0.2)}), *(make_pair(f"p{i}") for i in range(1, 4))]
    assert evaluate(VOTES, pairs)[0].judges[0].votes.n == 3


def test_several_models_have_strengths():
    names = ("a", "b"), ("b", "c"), ("a", "c")
    pairs = [make_pair(f"p{i}", *names[i % 3]) for i in range(12)]
    rng = random.Random(1)
    votes = [make_vote(person, pair["pair"], rng.choices(names[i % 3], (1, 3))[0], models=names[i % 3])
             for person in "vwxyz" for i, pair in enumerate(pairs)]
    results = evaluate(votes, pairs)[0]
    assert {(rate.model, rate.against) for rate in results.rates} == {
        (a, b) for a in "abc" for b in "abc" if a != b}
    assert [one.model for one in results.strengths] == ["c", "b", "a"]
    assert sum(one.strength for one in results.strengths) == pytest.approx(0)
    assert "Strength of each model" in results_text(results)


@pytest.mark.parametrize("votes", [[], [make_check("ann", passed=True)], [make_vote("ann", "p0", "tie")],
                                   [make_vote("ann", "p0", "tuned")]])
def test_few_votes_have_results_without_intervals(votes):
    results = evaluate(votes)[0]
    assert all(rate.rate.ci_low is None for rate in results.rates) and results.alpha.value is None
    json.dumps(results.as_dict(), allow_nan=False)
    assert "count" in summarise_votes(results) and results_text(results)
    assert "None" not in results_text(results) and "nan" not in results_text(results)


# --- files


def test_written_results(store):
    hashes = write_study(store, PAIRS, VOTES)
    results = write_results(store)
    written = store.read_json(f"studies/{STUDY}/results.json")
    assert written == json.loads(json.dumps(results.as_dict(), allow_nan=False))
    assert written["votes"] == {"read": len(VOTES), "used": 8, "left_out": {
        rules.REPEAT: 3, rules.CHECK: 6, rules.EXCLUDED: 4}}
    assert [one["participant"] for one in written["participants"]["checks"] if one["excluded"]] == [hashes["eve"]]
    answers = read_table(store, f"studies/{STUDY}/votes.parquet")
    assert answers.num_rows == len(VOTES) and answers["left_out"].null_count == 8
    assert not {"name", "address", "code"} & set(answers.column_names)
    text = store.read_bytes(f"studies/{STUDY}/results.md").decode()
    assert "| tuned against target | 85.7 %" in text and rules.RULE in text and "PickScore" in text


def test_scores_are_read_from_the_pairs(store):
    write_study(store, PAIRS, VOTES)
    assert [pair["first_scores"] for pair in read_pairs(store, STUDY)] == [pair["first_scores"] for pair in PAIRS]


def test_an_unknown_study_is_one_line(store):
    write_study(store, PAIRS, VOTES)
    with pytest.raises(InputError, match=f"nope is not a study .* it has {STUDY}"):
        write_results(store, "nope")


def test_the_command(store, tmp_path, capsys):
    write_study(store, PAIRS, VOTES)
    assert main(["study", "results", "--root", str(tmp_path), "--half-width", "10"]) == 0
    shown = capsys.readouterr().out
    assert "4 people gave 21 answers, of which 8 count" in shown and "± 10 points" in shown
    assert main(["study", "results", STUDY, "--root", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["half_width"] == 0.05
    assert main(["study", "results", "--root", str(tmp_path), "--half-width", "70"]) == 2
    assert "0.05 for 5 points" in capsys.readouterr().err


def test_an_artifact_needs_a_server(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prefect.settings.get_current_settings", lambda: type("S", (), {
        "api": type("A", (), {"url": None})}))
    write_study(store, PAIRS, VOTES)
    assert main(["study", "results", "--root", str(tmp_path), "--artifact"]) == 2
    assert "set PREFECT_API_URL" in capsys.readouterr().err


# --- in the report


def test_the_section_of_a_report(store):
    write_study(store, PAIRS, VOTES)
    waiting = people(read_people(store, {SOURCE}), {}, "/a root")
    assert f"<code>hgdpo study serve {STUDY} --root &#x27;/a root&#x27;</code>" in waiting
    write_results(store)
    found = read_people(store, {SOURCE, ""})
    assert len(found) == 1 and read_people(store, {"evaluations/other"}) == []
    assert [rate["model"] for rate in shown_rates(found[0])] == ["tuned"]
    html = people(found, {"pickscore": WinRate.from_counts(30, 10, 0)}, "/root")
    assert "People preferred tuned to target: 85.7 %" in html and "75.0 %" in html and "1 of 4 were" in html
    assert people([], {}, "/root") == "" and "waits for people" not in html


def test_damaged_results_do_not_end_a_run(store):
    write_study(store, PAIRS, VOTES)
    write_results(store)
    store.write_bytes(f"studies/{STUDY}/results.json", b"{}")
    assert read_people(store, {SOURCE}) == []


def test_names_in_results_are_escaped():
    pairs = [make_pair(f"p{i}", "<b>", "<script>") for i in range(2)]
    votes = [make_vote(who, f"p{i}", "<b>", models=("<b>", "<script>")) for who in ("ann", "bob") for i in range(2)]
    html = people([evaluate(votes, pairs)[0].as_dict()], {}, "/root")
    assert "<script>" not in html and "<b><" not in html and "&lt;script&gt;" in html


def test_a_preference_in_a_sentence():
    rate = {"model": "tuned", "against": "target", **WinRate.from_counts(0, 0, 3).as_dict()}
    assert preference(rate) == "People had no preference between tuned and target (no win, no loss (3 ties))"
