"""Scoring again as a flow and as commands, on a real Prefect server; and when a scheduled run gives way."""

import asyncio
import csv
import json
from datetime import UTC, datetime, timedelta

import pytest
from hand_pools import PROMPTS, draw, table_judge
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Pending, Running

from flows import nightly
from flows.children import ShardRunsError
from flows.cli import main
from flows.rescore import hgdpo_rescore
from hgdpo_core import scorers
from hgdpo_core.config.presets import figures
from hgdpo_core.execution.jobs import cut, run_shards, write_recipe
from hgdpo_core.rescore import score_missing
from hgdpo_core.rescore.plan import plan_requested
from hgdpo_core.storage import Store

NOW = datetime(2031, 1, 2, 15, tzinfo=UTC)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A pool of four candidates, scored by version one of a scorer that is a table."""
    monkeypatch.setitem(scorers.SCORERS, "pickscore", table_judge([]))
    store = Store(str(tmp_path / "root"))
    draw(store, "n4", PROMPTS, 4)
    score_missing(store, plan_requested(store, ["pickscore=one"]).jobs, device="cpu")
    return str(tmp_path / "root")


def artifacts(key):
    with get_client(sync_client=True) as client:
        filters = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
        return [str(item.data) for item in client.read_artifacts(artifact_filter=filters)]


# -- the flow


def test_a_night_and_the_next(server, root):
    draw(Store(root), "n4-half", PROMPTS, 4, shards=[0])
    plan = hgdpo_rescore(root=root, scorers=["pickscore=two"], plan_only=True)
    assert [(row["pool"], row["images"]) for row in plan["plan"]] == [("n4", 16)]
    assert plan["skipped"][0]["reason"].startswith("incomplete") and Store(root).list_folders("rescores") == []

    before = {key: (size, changed) for key, size, changed in Store(root).walk() if "/n4" in key}
    summary = hgdpo_rescore(root=root, scorers=["pickscore=two"])
    after = {key: (size, changed) for key, size, changed in Store(root).walk() if "/n4" in key}
    assert before.items() <= after.items()      # neither a pool nor an older score is written
    assert {key.rpartition("/")[0] for key in after.keys() - before.keys()} == {
        f"scores/n4/{name}" for name in Store(root).list_folders("scores/n4")} - {
        key.rpartition("/")[0] for key in before}
    row, = summary["drift"]
    assert row["tau_min"] == -1 and row["winner_flipped"] == pytest.approx(2 / 3) and row["images_scored"] == 16
    report = Store(root).read_json(f"rescores/{summary['night']}/report.json")
    assert report["pools"][0]["ranking"]["tau"]["mean"] == row["tau_mean"]
    assert summary["artifacts"]["report"].endswith(f"{summary['night']}/report.html")
    assert any(summary["night"] in text for text in artifacts("drift-report"))
    assert any("pool n4-half" in text for text in artifacts("rescore-skipped"))

    state = hgdpo_rescore(root=root, scorers=["pickscore=two"], return_state=True)
    assert state.is_completed() and state.name == "NothingToDo" and state.message.startswith("nothing to do")
    assert Store(root).list_folders("rescores") == [summary["night"]]


def test_verify_reaches_the_core(server, root):
    store = Store(root)
    folder = f"scores/n4/{store.list_folders('scores/n4')[0]}"
    name, = (name for name in store.list(folder) if name.startswith("shard-00000-"))
    data = store.read_bytes(f"{folder}/{name}")
    store.write_bytes(f"{folder}/{name}", b"x" * len(data))
    assert "status" in hgdpo_rescore(root=root, scorers=["pickscore=one"])
    assert hgdpo_rescore(root=root, scorers=["pickscore=one"], verify=True)["drift"][0]["images_scored"] == 8
    assert store.read_bytes(f"{folder}/{name}") == data


class Elsewhere:
    """A runner like that of the workers: it has requests, and no loaded scorer. The pool `broken` fails."""

    copy_to_store = False

    def __init__(self):
        self.ranges = []

    def make(self, stages, on):
        for stage in stages:
            write_recipe(stage)
        requests = [request for stage in stages for request in cut(stage, stage.find_missing(), 8)]
        for request in requests:
            if "/broken/" not in request.folder:
                self.ranges.append((request.stage, request.folder.split("/")[1], request.shards))
                run_shards(request)
        if len(requests) > len(self.ranges):
            raise ShardRunsError("1 of 3 shard runs failed")


def test_scores_are_made_by_shard_runs_where_workers_are(server, root, monkeypatch):
    draw(Store(root), "broken", PROMPTS[:2], 4)
    chosen = Elsewhere()
    monkeypatch.setattr("flows.lifecycle.choose_runner", lambda name, *_: chosen if name == "deployment" else None)
    assert main(["rescore", "--root", root, "--scorer", "pickscore=two", "--shard-runner", "deployment"]) == 0
    name, = Store(root).list_folders("rescores")
    report = Store(root).read_json(f"rescores/{name}/report.json")
    assert chosen.ranges == [("score", "n4", "0"), ("score", "n4", "1")]
    assert [(pool["pool_id"], pool["images_scored"]) for pool in report["pools"]] == [("n4", 16)]
    assert report["pools"][0]["ranking"]["tau"]["min"] == -1
    assert report["skipped"] == [{"what": "pool broken by pickscore", "reason": "1 of 3 shard runs failed"}]


def test_a_scheduled_run_that_gives_way_ends_completed(server, root, monkeypatch):
    monkeypatch.setattr("flows.rescore.reason_to_skip", lambda: "hgdpo/full is running (people)")
    state = hgdpo_rescore(root=root, scorers=["pickscore=two"], return_state=True)
    assert state.is_completed() and state.name == "Skipped"
    assert state.message == "skipped: hgdpo/full is running (people)"
    assert len(Store(root).list_folders("scores/n4")) == 1


# -- when it gives way


@pytest.mark.parametrize(("hours", "run_count", "running", "reason"), [
    (0, 1, [], None), (12, 1, [], None), (12.1, 1, [], "12 hours ago"), (30, 1, ["people"], "30 hours ago"),
    (30, 2, [], None), (0, 1, ["people"], "hgdpo/full is running (people)"), (30, 2, ["a", "b"], "running (a, b)")])
def test_age_and_a_live_full_run(hours, run_count, running, reason):
    found = nightly.check_schedule(NOW - timedelta(hours=hours), NOW, run_count=run_count, running=running)
    assert found is None if reason is None else reason in found


def test_only_live_runs_of_the_flow_count(server):
    @flow(name="hgdpo")
    def full():
        pass

    @flow(name="another")
    def another():
        pass

    async def create():
        async with get_client() as client:
            for flow_function, name, state in (
                    (full, "working", Running()), (full, "starting", Pending()), (full, "done", Completed()),
                    (full, "gone", Cancelled()), (another, "other", Running())):
                await client.create_flow_run(flow_function, name=name, state=state)

    asyncio.run(create())
    assert sorted(nightly.active_runs("hgdpo")) == ["starting", "working"]


def test_only_a_deployment_gives_way(server, monkeypatch):
    monkeypatch.setattr(nightly, "active_runs", lambda name: [f"a run of {name}"])
    assert nightly.reason_to_skip() is None
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "d9a0")

    @flow
    def scheduled():
        return nightly.reason_to_skip()

    assert "a run of hgdpo" in scheduled()
    monkeypatch.setattr(nightly, "active_runs", lambda name: [])
    assert scheduled() is None
    monkeypatch.setitem(vars(flow_run), "scheduled_start_time", NOW - timedelta(days=9_999))
    assert "the next night" in scheduled()


# -- the commands


def test_rescore_command(server, root, capsys):
    arguments = ["rescore", "--root", root, "--scorer", "pickscore=two"]
    assert main([*arguments, "--plan"]) == 0
    title, _, columns, row = capsys.readouterr().out.splitlines()
    assert title == f"Plan of re-scoring {Store(root).root} (nothing was made)" and columns.startswith("pool")
    assert row.split()[:2] == ["n4", "pickscore"]
    assert main([*arguments, "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["images"] == 16
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "winner changed on 66.7 %, loser on 33.3 % of 4 prompts" in out and "report.html" in out
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert again.startswith("Nothing to do") and again.rstrip().endswith("report.html")
    assert main([*arguments, "--verify"]) == 0 and capsys.readouterr().out.startswith("Nothing to do")


def test_score_command_for_pools(root, capsys):
    draw(Store(root), "n4-half", PROMPTS, 4, shards=[0])
    assert main(["score", "--root", root, "--scorer", "pickscore=two"]) == 0
    header, row, left = capsys.readouterr().out.splitlines()
    assert header.split() == ["pool", "scorer", "images", "mean", "std", "min", "median", "max"]
    assert row.split()[:4] == ["n4", "pickscore", "16", "3.625"] and "incomplete" in left
    assert Store(root).list_folders("rescores") == []


def test_score_command_for_files(judge_folder, tmp_path, capsys):
    from hgdpo_core.figures.dataset import write_image_folder

    write_image_folder(tmp_path / "images", 3, seed=0)
    (tmp_path / "images" / "torn.png").write_bytes(b"x")
    scorer, table = f"pickscore={judge_folder}", tmp_path / "scores.csv"
    assert main(["score", str(tmp_path / "images"), "--prompt", "a man", "--scorer", scorer, "--csv", str(table)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = list(csv.DictReader(table.open()))
    assert lines[0].split() == ["pickscore", "file", "prompt"] and len(rows) == 4
    scores = [float(row["pickscore"]) for row in rows[:3]]
    assert scores == sorted(scores, reverse=True) and lines[1].split()[0] == f"{scores[0]:.3f}"
    assert lines[4].startswith(" no score") and lines[5].startswith("no score: ") and "torn.png" in lines[5]


@pytest.mark.parametrize(("arguments", "message"), [
    (["rescore", "--scorer", "beauty"], "scorer 'beauty'"),
    (["rescore", "--scorer", "pickscore=/no/where"], "does not exist"),
    (["rescore", "--set", "scorer.batch_size=3"], "name the preset"),
    (["rescore", "--preset", "flux"], "no preset 'flux'"),
    (["rescore", "--root", "/proc/hgdpo"], "/proc/hgdpo"),
    (["score", "--csv", "x.csv"], "go with image files"),
    (["score", "/no/such/folder", "--scorer", "pickscore"], "not a folder"),
])
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path):
    root = [] if "--root" in arguments else ["--root", str(tmp_path)]
    assert main([*arguments, *root]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("hgdpo: error: ") and error.count("\n") == 1


def test_the_runs_of_a_root_say_which_scorers(root, capsys):
    config = figures()
    scorer = config.scorer.model_copy(update={"source": "one"})
    changed = config.model_copy(update={"scorer": scorer})
    Store(root).write_json("runs/a/config.json", {"code_version": "0", **changed.model_dump(mode="json")})
    assert main(["rescore", "--root", root]) == 0
    assert capsys.readouterr().out.startswith("Nothing to do; complete sets of scores found: 1")
