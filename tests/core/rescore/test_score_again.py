"""Scoring again: only what is missing, new rankings beside the old ones, and a drift report worked out by hand.

The judge is a table (tests/hand_pools.py), so every ranking is known.
"""

import hashlib
import json
import shutil
from datetime import UTC, datetime

import numpy as np
import pytest
import tiny
from faulty_s3 import served_bucket
from hand_pools import HELD_OUT, PROMPTS, TABLE, Judge, draw, table_judge

from hgdpo_core import scorers
from hgdpo_core.config import ScorerConfig, TripletConfig
from hgdpo_core.errors import ConfigError, InputError, ModelError, StoppedError
from hgdpo_core.prompts import PromptList, prompt_id, save_prompts
from hgdpo_core.rescore import Ranking, rank_again, score_missing, summarise_pools
from hgdpo_core.rescore.plan import Skipped, find_versions, plan_requested, plan_rescore
from hgdpo_core.rescore.requested import RequestedScorer
from hgdpo_core.rescore.rescore_run import close_rescore_run, last_report, open_rescore_run
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.triplets import TripletStage, triplet_folder
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder


@pytest.fixture
def loads(monkeypatch):
    """Versions of the scorer that were loaded, in order."""
    loaded = []
    monkeypatch.setitem(scorers.SCORERS, "pickscore", table_judge(loaded))
    return loaded


@pytest.fixture
def store(tmp_path, loads):
    """A root with a pool of four candidates, as if a run had scored and ranked it by version one."""
    store = Store(str(tmp_path / "root"))
    fill(store)
    return store


def fill(store):
    draw(store, "n4", PROMPTS, 4)
    prompts_id = save_prompts(store, PromptList(tuple(PROMPTS)))
    work(store, "one", write=False)
    pool = ShardFolder.open(store, "pools/n4")
    scores = ShardFolder.open(store, scores_key(store, "n4", "one"))
    triplets = triplet_folder(store, pool, scores, prompts_id, TripletConfig())
    requested = frozenset(map(prompt_id, PROMPTS))
    TripletStage(pool, scores, triplets, requested, TripletConfig(), (0, 1)).make(Worker("cpu"))


def versions(*names):
    return find_versions([RequestedScorer(scorer=ScorerConfig(source=name)) for name in names], required=True)[0]


def scores_key(store, pool_id, version):
    for name in store.list_folders(f"scores/{pool_id}"):
        if ShardFolder.open(store, f"scores/{pool_id}/{name}").config["fingerprint"] == f"fingerprint of {version}":
            return f"scores/{pool_id}/{name}"
    raise AssertionError(version)


def work(store, version, *, write=True, verify=False, now=None):
    """One whole rescore run by a version of the scorer; returns its report, None when there was nothing to do."""
    plan = plan_rescore(store, versions(version), verify=verify)
    run = open_rescore_run(store, plan, now=now) if write else None
    skipped = list(plan.skipped)
    for _, jobs in plan.by_version():
        skipped += score_missing(store, jobs, device="cpu")
    if run is None:
        return None
    ranked = [rank_again(store, job) for job in run.rankings]
    skipped += [item for item in ranked if isinstance(item, Skipped)]
    return close_rescore_run(store, run, [item for item in ranked if isinstance(item, Ranking)], skipped)


def tree(store, folder):
    return {key: hashlib.sha256(store.read_bytes(key)).hexdigest() for key, _, _ in store.walk(folder)}


# -- what there is to do


def test_an_empty_root_has_nothing_to_do(tmp_path):
    plan = plan_requested(Store(str(tmp_path)))
    assert plan.nothing_to_do and plan.describe() == "nothing to do; complete sets of scores found: 0"


def test_pools_without_a_requested_scorer_raise(store):
    with pytest.raises(ConfigError, match="name a scorer or a preset"):
        plan_requested(store)


def test_nothing_to_do_loads_nothing_and_writes_nothing(store, loads):
    loads.clear()
    before = tree(store, "")
    plan = plan_rescore(store, versions("one"))
    assert plan.nothing_to_do and [item.pool_id for item in plan.complete] == ["n4"]
    assert open_rescore_run(store, plan) is None and work(store, "one") is None
    assert loads == [] and tree(store, "") == before


def test_one_list_a_folder(store, monkeypatch):
    listed = []
    real = Store._entries
    monkeypatch.setattr(Store, "_entries", lambda self, folder: listed.append(folder) or real(self, folder))
    assert plan_rescore(store, versions("one")).nothing_to_do
    assert len(listed) == len(set(listed)) and set(listed) >= {"pools", "pools/n4", "scores/n4", "triplets"}


def test_only_missing_shards_are_scored(store, loads):
    key = scores_key(store, "n4", "one")
    kept = store.read_bytes(f"{key}/shard-00000.json")
    store.delete(f"{key}/shard-00001.json")
    loads.clear()
    plan = plan_rescore(store, versions("one"))
    assert [(job.missing, job.images, job.before) for job in plan.jobs] == [((1,), 8, None)]
    calls = []
    assert score_missing(store, plan.jobs, device="cpu", progress=lambda *call: calls.append(call)) == []
    assert calls[-1] == (8, 8, "images") and loads == ["one"]
    assert store.read_bytes(f"{key}/shard-00000.json") == kept
    assert plan_rescore(store, versions("one")).nothing_to_do     # same bytes: the triplets made from them still hold


def test_one_load_serves_all_pools(store, loads):
    for number in range(3):
        draw(store, f"n1-{number}", HELD_OUT, 1)
    loads.clear()
    plan = plan_rescore(store, versions("one"))
    calls = []
    score_missing(store, plan.jobs, device="cpu", progress=lambda done, total, _: calls.append((done, total)))
    assert loads == ["one"] and calls[-1] == (9, 9) and calls == sorted(calls)


def test_incomplete_pools_are_skipped_with_the_reason(store):
    draw(store, "n4-half", PROMPTS, 4, shards=[0])
    draw(store, "n4-growing", PROMPTS[:2], 4, expected={"shards": 1, "rows": 16})
    store.write_bytes("pools/n4-torn/config.json", b'{"stage": "po')
    store.write_json("pools/n4-silent/config.json", {"stage": "pool"})
    report = work(store, "two")
    assert {item["what"]: item["reason"] for item in report["skipped"]} == {
        "pool n4-half": "incomplete: 1 of 2 shards, 8 of 16 images",
        "pool n4-growing": "incomplete: 1 of 1 shards, 8 of 16 images",
        **dict.fromkeys(("pool n4-torn", "pool n4-silent"), "its config.json is missing, unreadable or does not say "
                                                            "how many shards it should have")}
    assert [pool["pool_id"] for pool in report["pools"]] == ["n4"]
    assert store.list_folders("scores") == ["n4"]
    assert "n4-half" in store.read_bytes(f"rescores/{report['night']}/report.md").decode()


def test_a_missing_scorer_of_an_old_run_does_not_stop_the_others(store):
    gone, two = (RequestedScorer(scorer=ScorerConfig(source=source)) for source in ("gone", "two"))
    found, skipped = find_versions([gone, two], required=False)
    assert [version.fingerprint for version in found] == ["fingerprint of two"]
    assert "gone does not exist" in skipped[0].reason
    for required, requested in ((True, [gone, two]), (False, [gone])):
        with pytest.raises(ModelError, match="does not exist"):
            find_versions(requested, required=required)


def test_a_scorer_that_only_evaluates_scores_no_training_pool(store):
    """The fixture's pool has triplets; of the others two are an evaluation's, and the last is unused."""
    for name in ("target", "tuned", "unknown"):
        draw(store, f"n1-{name}", HELD_OUT, 1)
    store.write_json("evaluations/3-x/config.json", {"target": "pools/n1-target", "tuned": "pools/n1-tuned"})

    def pools(kind):
        scorer = RequestedScorer(scorer=ScorerConfig(source="two"), pools=kind)
        return [job.pool_id for job in plan_rescore(store, find_versions([scorer], required=True)[0]).jobs]

    assert pools("evaluation") == ["n1-target", "n1-tuned"]
    assert pools("training") == ["n1-unknown", "n4"]
    assert pools("all") == ["n1-target", "n1-tuned", "n1-unknown", "n4"]


def test_prompts_that_a_scorer_does_not_support_skip_their_pool_only(store, monkeypatch):
    draw(store, "n4-other", PROMPTS[:2], 4)
    real = Judge.score

    def score(self, images, prompts):
        if PROMPTS[2] in prompts:
            raise InputError("knows captions of its own world only")
        return real(self, images, prompts)

    monkeypatch.setattr(Judge, "score", score)
    report = work(store, "two")
    assert report["skipped"][0] == {"what": "pool n4 by pickscore", "reason": "knows captions of its own world only"}
    assert [(pool["pool_id"], pool["images_scored"]) for pool in report["pools"]] == [("n4", 8), ("n4-other", 8)]


# -- a rescore run


def test_a_changed_scorer_by_hand(store):
    """Version two turns one pair of prompt 0 round, reverses prompt 1, leaves prompt 2 and cannot tell prompt 3."""
    pools, old_scores = tree(store, "pools"), tree(store, "scores")
    replaced = store.list_folders("triplets")[0]
    store.write_bytes(f"triplets/{replaced}/README.md", b"---\nlicense: cc0-1.0\n---\n")
    old_triplets = tree(store, "triplets")
    report = work(store, "two")

    pool, = report["pools"]
    assert (pool["images_scored"], pool["prompts"], pool["prompts_compared"]) == (16, 4, 4)
    ranking = pool["ranking"]
    assert ranking["tau"]["mean"] == pytest.approx((4 / 6 - 1 + 1) / 3) and ranking["tau"]["min"] == -1
    assert ranking["tau"]["undefined"] == 1 and ranking["pairs_compared"] == 3 and ranking["pairs_lost"] == 1
    assert ranking["winner_flipped"]["prompts"] == 2 and ranking["loser_flipped"]["prompts"] == 1
    assert ranking["winner_or_loser_flipped"]["share"] == pytest.approx(2 / 3)
    assert [(worst["prompt"], worst["winner"], worst["loser"]) for worst in pool["worst_prompts"]] == [
        (PROMPTS[1], [3, 0], [0, 3]), (PROMPTS[0], [3, 2], [0, 0])]
    assert pool["worst_prompts"][1]["tau"] == pytest.approx(4 / 6)
    assert (pool["scores_before"]["mean"], pool["scores_now"]["mean"]) == (2.5, (3 * 10 + 28) / 16)
    assert sum(pool["histogram"]["before"]) == sum(pool["histogram"]["now"]) == 16

    triplets, = report["triplets"]
    assert triplets["replaces"] in {key.rpartition("/")[0] for key in old_triplets}
    assert triplets["triplets"] != triplets["replaces"]
    assert (triplets["rows"], triplets["rejected"]) == (3, 1)
    assert (triplets["prompts_compared"], triplets["same_pair"]) == (3, 1)
    made = ShardFolder.open(store, triplets["triplets"])
    pairs = {row["caption"]: (row["winner_index"], row["loser_index"])
             for index in (0, 1) for row in made.read(index).to_pylist()}
    assert pairs == {PROMPTS[0]: (2, 0), PROMPTS[1]: (0, 3), PROMPTS[2]: (3, 0)}
    assert store.read_bytes(f"{triplets['triplets']}/README.md").startswith(b"---\nlicense: cc0-1.0\n")

    assert tree(store, "pools") == pools
    for old, folder in ((old_scores, "scores"), (old_triplets, "triplets")):
        assert tree(store, folder).items() >= old.items()
    assert store.list_folders("models") == []       # nothing was trained


def test_the_second_run_finds_nothing_to_do_and_keeps_the_first_report(store, loads):
    report = work(store, "two")
    kept = tree(store, "rescores")
    loads.clear()
    assert work(store, "two") is None
    assert loads == [] and tree(store, "rescores") == kept
    assert last_report(store) == f"rescores/{report['night']}/report.html"


def test_runs_of_one_second_have_their_own_folders(store):
    now = datetime(2031, 1, 2, 3, 4, 5, tzinfo=UTC)
    first = work(store, "two", now=now)
    store.delete(f"{scores_key(store, 'n4', 'two')}/shard-00001.json")
    second = work(store, "two", now=now)
    assert [first["night"], second["night"]] == ["2031-01-02T030405Z", "2031-01-02T030405Z-2"]
    assert store.list_folders("rescores") == [first["night"], second["night"]]
    assert second["pools"][0]["images_scored"] == 8 and second["pools"][0]["prompts"] == 2


def test_first_scores_have_no_drift(store):
    draw(store, "n4-new", PROMPTS[:2], 4)
    report = work(store, "one")
    pool, = report["pools"]
    assert pool["before"] is None and pool["ranking"] is None and pool["scores_before"] is None
    assert pool["scores_now"]["mean"] == 2.5 and report["triplets"] == []
    assert "no earlier scores" in store.read_bytes(f"rescores/{report['night']}/report.md").decode()


def test_a_ranking_that_is_missing_is_made_without_scoring(store, loads):
    """As after `hgdpo score` with another judge: its scores exist, the run ranks them and reports the drift."""
    work(store, "two", write=False)
    loads.clear()
    report = work(store, "two")
    assert loads == [] and report["triplets"][0]["rows"] == 3
    assert report["pools"][0]["images_scored"] == 0 and report["pools"][0]["ranking"]["winner_flipped"]["prompts"] == 2


def test_drift_is_measured_against_the_latest_complete_scores(store, monkeypatch):
    monkeypatch.setitem(TABLE, "three", TABLE["one"])
    work(store, "two")
    key = scores_key(store, "n4", "two")
    for index in (0, 1):    # say that version two came a day after version one
        manifest = store.read_json(f"{key}/shard-{index:05d}.json")
        store.write_json(f"{key}/shard-{index:05d}.json", manifest | {"created_at": "2199-01-01T00:00:00+00:00"})
    assert plan_rescore(store, versions("three")).jobs[0].before == key
    store.delete(f"{key}/shard-00001.json")     # the latest is not complete now
    assert plan_rescore(store, versions("three")).jobs[0].before == scores_key(store, "n4", "one")


def test_a_missing_list_of_prompts_is_reported(store):
    name, = store.list_folders("prompts")
    store.delete(f"prompts/{name}/prompts.parquet")
    report = work(store, "two")
    assert report["triplets"] == [] and report["pools"][0]["images_scored"] == 16
    assert "its list of prompts is gone" in report["skipped"][0]["reason"]


def test_win_rates_of_evaluations_before_and_now(store):
    """Version one: the tuned model wins two of three. Version two: it loses two and ties one."""
    for model, name in enumerate(("target", "tuned")):
        draw(store, f"n1-{name}", HELD_OUT, 1, model=model)
    work(store, "one")
    folders = [f"pools/n1-{name}" for name in ("target", "tuned")]
    store.write_json("evaluations/3-x/config.json", {
        "target": folders[0], "tuned": folders[1], "prompts": HELD_OUT,
        "scores": {"pickscore": [scores_key(store, f"n1-{name}", "one") for name in ("target", "tuned")]}})
    store.write_json("evaluations/of-another-kind/config.json", {"models": 3})
    before = tree(store, "evaluations")
    item, = work(store, "two")["evaluations"]
    assert (item["evaluation_id"], item["scorer"]) == ("3-x", "pickscore")
    assert (item["before"]["wins"], item["before"]["losses"], item["before"]["ties"]) == (2, 1, 0)
    assert (item["now"]["wins"], item["now"]["losses"], item["now"]["ties"]) == (0, 2, 1)
    assert tree(store, "evaluations") == before


# -- what breaks


def test_a_corrupted_score_is_quarantined_and_made_again(store):
    key = scores_key(store, "n4", "one")
    manifest = ShardFolder.open(store, key).manifests()[1]
    data = store.read_bytes(f"{key}/{manifest.file}")
    store.write_bytes(f"{key}/{manifest.file}", data[:-1] + bytes([data[-1] ^ 1]))
    assert plan_rescore(store, versions("one")).nothing_to_do       # the size is right and the content is not read
    report = work(store, "one", verify=True)
    assert report["pools"][0]["images_scored"] == 8
    assert any(name.endswith(manifest.file) for name in store.list(f"{key}/quarantine"))
    assert store.read_bytes(f"{key}/{manifest.file}") == data
    assert plan_rescore(store, versions("one"), verify=True).nothing_to_do


def test_corrupted_earlier_scores_are_reported_and_left_out(store):
    key = scores_key(store, "n4", "one")
    manifest = ShardFolder.open(store, key).manifests()[1]
    store.write_bytes(f"{key}/{manifest.file}", b"x" * manifest.bytes)
    report = work(store, "two")
    assert report["pools"][0]["prompts_compared"] == 2 and report["pools"][0]["images_scored"] == 16
    assert report["skipped"][0]["what"] == key and "quarantine" in report["skipped"][0]["reason"]


def test_a_corrupted_pool_is_skipped_and_the_others_continue(store):
    draw(store, "n4-other", PROMPTS[:2], 4)
    pool = ShardFolder.open(store, "pools/n4")
    manifest = pool.manifests()[0]
    store.write_bytes(f"pools/n4/{manifest.file}", b"x" * manifest.bytes)
    report = work(store, "two")
    assert report["skipped"][0]["what"] == "pool n4 by pickscore" and report["triplets"] == []
    assert "no scores" in report["skipped"][1]["reason"]
    assert [pool["pool_id"] for pool in report["pools"]] == ["n4-other"]
    plan = plan_rescore(store, versions("two"))
    assert plan.nothing_to_do and "1 of 2 shards" in plan.skipped[0].reason


def test_a_killed_run_is_finished_by_the_next(store):
    """Killed after scoring: nothing is missing any more, but its ranking and its report are."""
    plan = plan_rescore(store, versions("two"))
    killed = open_rescore_run(store, plan)
    score_missing(store, plan.jobs, device="cpu")
    rank_again(store, killed.rankings[0])
    assert plan_rescore(store, versions("two")).nothing_to_do and last_report(store) is None
    report = work(store, "two")
    assert report["night"] == killed.name and store.list_folders("rescores") == [killed.name]
    assert report["pools"][0]["ranking"]["winner_flipped"]["prompts"] == 2
    assert report["pools"][0]["images_scored"] == 16 and report["triplets"][0]["rows"] == 3


def test_a_run_killed_while_scoring_keeps_its_finished_shards(store, loads):
    plan = plan_rescore(store, versions("two"))
    killed = open_rescore_run(store, plan)
    asked = iter([False, True])
    with pytest.raises(StoppedError):
        score_missing(store, plan.jobs, device="cpu", should_stop=lambda: next(asked))
    assert plan_rescore(store, versions("two")).jobs[0].missing == (1,)
    report = work(store, "two")
    assert report["night"] == killed.name
    assert report["pools"][0]["prompts_compared"] == 4 and report["pools"][0]["images_scored"] == 16


def test_an_unfinished_run_of_a_scorer_that_is_no_longer_requested_ends(store):
    open_rescore_run(store, plan_rescore(store, versions("two")))
    report = work(store, "one")
    assert report["pools"] == [] and work(store, "one") is None


def test_a_scorer_that_changes_between_plan_and_work_is_refused(store, monkeypatch):
    plan = plan_rescore(store, versions("two"))
    monkeypatch.setattr(scorers.SCORERS["pickscore"], "load", lambda **_: Judge("one"))
    with pytest.raises(ModelError, match="changed since the plan was made"):
        score_missing(store, plan.jobs, device="cpu")
    assert len(store.list_folders("scores/n4")) == 1


# -- the report


def test_the_page_is_self_contained_and_escapes_texts(store):
    report = work(store, "two")
    page = store.read_bytes(f"rescores/{report['night']}/report.html").decode()
    assert "a woman &lt;b&gt;|&lt;/b&gt;" in page and "<b>|</b>" not in page
    assert "Area: before, line: now" in page and "Kendall&#x27;s tau" in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    text = store.read_bytes(f"rescores/{report['night']}/report.md").decode()
    assert r"a woman &lt;b&gt;\|&lt;/b&gt;" in text and "2 of 3 (66.7 %)" in text
    assert json.loads(store.read_bytes(f"rescores/{report['night']}/report.json")) == report


def test_a_table_of_all_pools(store):
    draw(store, "n4-half", PROMPTS, 4, shards=[0])
    plan = plan_rescore(store, versions("two"))
    assert summarise_pools(store, plan) == []
    score_missing(store, plan.jobs, device="cpu")
    row, = summarise_pools(store, plan_rescore(store, versions("two")))
    assert (row["pool"], row["scorer"], row["images"], row["min"], row["max"]) == ("n4", "pickscore", 16, 1, 7)
    assert row["mean"] == pytest.approx(58 / 16)


# -- real scorers, and S3


def test_new_weights_in_the_same_folder_are_another_version(tmp_path, judge_folder):
    store, folder = Store(str(tmp_path / "root")), tmp_path / "judge"
    draw(store, "n4", PROMPTS, 4)
    shutil.copytree(judge_folder, folder)

    def plan():
        return plan_requested(store, [f"pickscore={folder}"])

    score_missing(store, plan().jobs, device="cpu")
    assert plan().nothing_to_do
    shutil.rmtree(folder)
    tiny.save_judge(folder, seed=1)
    again = plan()
    assert again.jobs[0].missing == (0, 1) and again.jobs[0].before is not None
    run = open_rescore_run(store, again)
    score_missing(store, again.jobs, device="cpu")
    report = close_rescore_run(store, run, [], [])
    assert -1 <= report["pools"][0]["ranking"]["tau"]["mean"] < 1
    assert np.isfinite(report["pools"][0]["scores_now"]["mean"]) and plan().nothing_to_do


def test_the_same_on_s3(loads, tmp_path):
    reports = []
    with served_bucket():
        for root in ("s3://bucket/people", str(tmp_path)):
            store = Store(root)
            fill(store)
            reports.append(work(store, "two"))
            assert work(store, "two") is None and len(store.list_folders("rescores")) == 1
    there, here = reports
    for name in ("pools", "triplets", "scorers", "skipped", "evaluations"):
        assert there[name] == here[name]
