"""The whole pipeline on a real server with real workers and an S3 server: faults, retries, the same rows.

At the end what the server does by itself: the schedule, the automations.
"""

import signal
import subprocess
import sys

import live
import pytest
import tiny
from faulty_s3 import SECRET, served_bucket

from deployments import local

PROMPTS = [f"a woman in a red top, number {i}" for i in range(6)]
EVERY_TEN_SECONDS = "* * * * * */10"
SCHEDULER = {"PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "3",             # as shipped: a minute
             "PREFECT_SERVER_SERVICES_SCHEDULER_MIN_SCHEDULED_TIME": "PT30S"}   # else 100 runs are made in advance
SILENT_SECONDS = 45  # heartbeats come every 30 s
PENDING_SECONDS = 20  # a run that is well may be Pending for longer on a busy machine: it is not well that counts here


@pytest.fixture(scope="module")
def bucket():
    with served_bucket() as server:
        yield server


@pytest.fixture(scope="module")
def workers(tmp_path_factory, bucket):
    folder = tmp_path_factory.mktemp("live")
    environment = bucket.environment | {"XDG_CACHE_HOME": str(folder / "cache"), "HGDPO_TEST_SLOW": "0.05",
                                        "HGDPO_ROOT": str(folder / "root"), **SCHEDULER}
    del environment["AWS_SECRET_ACCESS_KEY"]  # without it no request is signed, let alone sent
    with live.live(folder, environment, secrets={"AWS_SECRET_ACCESS_KEY": SECRET}, cron=EVERY_TEN_SECONDS) as up:
        yield up


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    return live.small_run(tmp_path_factory.mktemp("user"), PROMPTS, 2, **{
        "pool.images_per_prompt": 3, "workers.draw_images_per_run": 6})


def manifests(store, stage=""):
    """The manifests of a stage, to see that none was written twice."""
    return {key: store.read_json(key) for key, _, _ in store.walk(stage) if key.endswith(".json") and "/shard-" in key}


def test_retry_makes_only_the_failed_shard_and_the_run_completes(workers, parameters, tmp_path):
    """The later stages' results lie there already. They fit, byte for byte, only if the pool is made as it was."""
    prompts = PROMPTS[:4]
    (tmp_path / "four.txt").write_text("\n".join(prompts))
    there = parameters | {"root": "s3://bucket/retried", "prompts": str(tmp_path / "four.txt")}
    store = live.run_undisturbed(there)
    rows, made = live.row_hashes(store), manifests(store)
    of_training = [key for key in made if "n3-" in key and key.startswith(("pools/", "scores/"))]
    assert len(of_training) == 8
    for key in of_training:
        store.delete(key)

    workers.fault("raise", 1, prompts[1])   # the second shard of the first range fails, once
    workers.fault("hold", 0, prompts[2])    # the second range takes until the first was retried
    parent = workers.start("hgdpo/full", there)
    failed = workers.until("a failed shard run", lambda: next(
        (run for run in workers.children(parent) if run["state_type"] == "FAILED"), None))
    assert failed["name"].startswith(f"pool 0-1: {prompts[0][:23].rstrip()}…")
    assert "a fault of the test" in failed["state"]["message"]
    assert f"shard:{failed['parameters']['request']['folder'].split('/')[1]}:0" in failed["tags"]
    committed = manifests(store, "pools")
    workers.retry(failed["id"])
    assert workers.await_final(failed["id"])["state_type"] == "COMPLETED"
    assert [prompt for prompt in workers.painted() if prompt in prompts[:2]] == [prompts[0], prompts[1], prompts[1]]
    assert workers.run(parent)["state_type"] == "RUNNING"
    workers.release("hold", 0)

    ended = workers.await_final(parent)
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"] + workers.log_tails()
    assert ended["run_count"] == 1
    started = [(run["name"].split()[0], run["run_count"]) for run in workers.children(parent)]
    assert sorted(started) == [("pool", 1), ("pool", 2), ("score", 1)]
    assert workers.painted().count(prompts[2]) == workers.painted().count(prompts[3]) == 1
    after = manifests(store)
    kept = committed | {key: manifest for key, manifest in made.items() if key not in of_training}
    assert all(after[key] == manifest for key, manifest in kept.items())    # no committed shard is made again
    assert live.row_hashes(store) == rows
    run_id, = store.list_folders("runs")
    assert store.read_json(f"runs/{run_id}/summary.json")["pool_images"] == 12

    study = workers.await_final(workers.start("hgdpo-study/create", {"sources": [run_id], "root": there["root"]}))
    assert study["state_type"] == "COMPLETED", study["state"]["message"] + workers.log_tails()
    assert len(store.list_folders("studies")) == 1
    assert workers.stored().count(SECRET) == 0 < workers.stored().count("prefect.blocks.secret.aws-secret-access-key")


@pytest.mark.slow
def test_failed_and_killed_shards_and_a_killed_parent_lead_to_the_same_rows(workers, parameters, tmp_path):
    workers.fault("raise", 1, PROMPTS[1])  # the second shard of the first range fails, once
    workers.fault("kill", 2, PROMPTS[2])  # the second range is killed in its first shard
    there, earlier = parameters | {"root": "s3://bucket/people"}, workers.painted()
    parent = workers.start("hgdpo/full", there)

    # The parent dies while its shards run; they do not need it.
    workers.until("a running shard", lambda: any(c["state_type"] == "RUNNING" for c in workers.children(parent)))
    workers.until("three shard runs", lambda: len(workers.children(parent, "pool")) == 3)
    workers.process_of(parent).send_signal(signal.SIGKILL)
    assert workers.await_final(parent)["state_type"] == "CRASHED"
    ranges = {child["name"]: child for child in workers.await_quiet(parent)}
    assert [child["state_type"] for _, child in sorted(ranges.items())] == ["FAILED", "CRASHED", "COMPLETED"]
    first = f"pool 0-1: {PROMPTS[0][:23].rstrip()}…"
    failed = next(child for name, child in ranges.items() if name.startswith(first))
    assert "a fault of the test" in failed["state"]["message"]
    assert f"shard:{failed['parameters']['request']['folder'].split('/')[1]}:0" in failed["tags"]

    # Retry on the failed shard run makes only the shard that is missing in its range.
    before = workers.painted()[len(earlier):]
    assert sorted(before) == sorted([PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[4], PROMPTS[5]])
    store = live.Store(there["root"])
    committed = manifests(store, "pools")
    workers.retry(failed["id"])
    assert workers.await_final(failed["id"])["state_type"] == "COMPLETED"
    assert workers.painted()[len(earlier) + len(before):] == [PROMPTS[1]]

    # Retry on the parent starts the killed range again and goes on to its end.
    workers.retry(parent)
    ended = workers.await_final(parent)
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"] + workers.log_tails()
    pool_runs = workers.children(parent, "pool")
    assert {child["state_type"] for child in pool_runs} == {"COMPLETED"}
    assert sorted(child["run_count"] for child in pool_runs if "woman" in child["name"]) == [1, 2, 2]
    assert sorted(workers.painted()[len(earlier) + len(before) + 1:][:2]) == [PROMPTS[2], PROMPTS[3]]
    after = manifests(store, "pools")
    assert all(after[key] == manifest for key, manifest in committed.items())  # no committed shard is made again

    undisturbed = live.run_undisturbed(parameters | {"root": str(tmp_path / "undisturbed")})
    assert live.row_hashes(store) == live.row_hashes(undisturbed)


@pytest.mark.slow
def test_a_fifth_of_all_requests_failing_changes_no_row(workers, parameters, bucket, tmp_path):
    bucket.misbehave(0.2, seed=1)
    store = live.Store("s3://bucket/spoiled")
    ended = workers.await_final(workers.start("hgdpo/full", parameters | {"root": store.root}))
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"] + workers.log_tails()
    spoiled = sum(bucket.spoiled.values())
    bucket.behave()
    assert spoiled > 100
    undisturbed = live.run_undisturbed(parameters | {"root": str(tmp_path / "undisturbed")})
    assert live.row_hashes(store) == live.row_hashes(undisturbed)


@pytest.mark.slow
def test_a_cancelled_parent_takes_its_shard_runs_along(workers, parameters, tmp_path):
    there = parameters | {"root": str(tmp_path / "root")}
    there["overrides"] = there["overrides"] | {"pool.images_per_prompt": 200, "workers.draw_images_per_run": 200}
    parent = workers.start("hgdpo/full", there)
    workers.until("a running shard", lambda: any(c["state_type"] == "RUNNING" for c in workers.children(parent)))
    workers.cancel(parent)
    assert workers.await_final(parent)["state_type"] == "CANCELLED"
    # One that is told to stop while it still imports calls itself Crashed, until its worker reports some seconds later;
    # one that its worker was about to start stays Cancelling for five minutes, a setting of the server's.
    workers.until("all shard runs ended", lambda: {
        child["state_type"] for child in workers.children(parent)} <= {"CANCELLED", "COMPLETED"})
    children = workers.children(parent)
    assert len(children) >= 2 and "CANCELLED" in {child["state_type"] for child in children}
    assert not [child for child in children if workers.process_of(child["id"])]


@pytest.mark.slow
def test_two_models_are_compared_on_workers(workers, parameters, tmp_path):
    overrides = {name: value for name, value in parameters["overrides"].items()
                 if name.startswith(("sampler.", "target.")) or name == "pool.prompts_per_shard"}
    source = parameters["overrides"]["scorer.source"]
    there = {"root": "s3://bucket/compared", "target": parameters["target"], "overrides": overrides,
             "tuned": str(tiny.save_target(tmp_path / "other", seed=1)), "scorers": [f"pickscore={source}"],
             "prompts": parameters["overrides"]["evaluation.prompts"]["source"]}
    parent = workers.start("hgdpo-evaluate/evaluate", there)
    ended = workers.await_final(parent)
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"] + workers.log_tails()
    names = sorted(run["name"].partition(":")[0] for run in workers.children(parent))
    assert names == ["evaluation images, target 0-1", "evaluation images, tuned 0-1", "pickscore, target 0-1",
                     "pickscore, tuned 0-1"]
    store = live.Store(there["root"])
    run = next(name for name in store.list_folders("runs") if name.startswith("evaluate-"))
    assert store.read_json(f"runs/{run}/summary.json")["win_rate"]["pickscore"]["n"] == 2


@pytest.mark.slow
def test_a_night_and_the_next(workers, parameters, tmp_path):
    """A scorer that changed: only its scores are made, by shard runs, and the next run has nothing to do."""
    finished = parameters | {"root": "s3://bucket/nights"}
    assert workers.await_final(workers.start("hgdpo/full", finished))["state_type"] == "COMPLETED", workers.log_tails()
    store = live.Store("s3://bucket/nights")
    pools, painted = manifests(store, "pools"), workers.painted()
    rescore = {"root": store.root, "scorers": [f"pickscore={tiny.save_judge(tmp_path / 'judge', seed=1)}"]}

    run = workers.start("hgdpo-rescore/nightly", rescore)
    ended = workers.await_final(run)
    assert (ended["state_type"], ended["state_name"]) == ("COMPLETED", "Completed"), ended["state"]["message"]
    scored = workers.children(run)
    assert len(scored) == 3 and all(run["name"].startswith("pickscore, n") for run in scored)
    assert manifests(store, "pools") == pools and workers.painted() == painted
    made, = store.list_folders("rescores")
    report = store.read_json(f"rescores/{made}/report.json")
    assert sum(pool["images_scored"] for pool in report["pools"]) == 3 * len(PROMPTS) + 2 * 2
    assert report["skipped"] == [] and len(report["triplets"]) == 1

    again = workers.start("hgdpo-rescore/nightly", rescore)
    ended = workers.await_final(again)
    assert (ended["state_type"], ended["state_name"]) == ("COMPLETED", "NothingToDo")
    assert workers.children(again) == [] and store.list_folders("rescores") == [made]


# -- what the server does by itself


def test_a_schedule_that_is_turned_on_starts_runs(workers):
    """As `make schedule` turns it on. With SQLAlchemy 2.1 the scheduler of Prefect 3.8.8 fails and no run appears."""
    try:
        local.schedule(workers.local)
        started = workers.until("a scheduled run that has started", lambda: next(
            (run for run in workers.runs() if run["auto_scheduled"] and run["run_count"]), None))
        ended = workers.await_final(started["id"])
    finally:
        turn_schedule_off(workers)
    assert (ended["state_type"], ended["state_name"]) == ("COMPLETED", "NothingToDo"), ended["state"]["message"]


def turn_schedule_off(workers):
    nightly = workers.http.get("/deployments/name/hgdpo-rescore/nightly").json()
    for schedule in nightly["schedules"]:
        workers.patch(f"/deployments/{nightly['id']}/schedules/{schedule['id']}", {"active": False})
    workers.until("the end of all scheduled runs", lambda: not [
        run for run in workers.runs(state={"type": {"any_": live.LIVE}}) if run["auto_scheduled"]])


def test_each_automation_fires_and_leaves_a_living_run_alone(workers, parameters, tmp_path):
    """One run dies with its worker while it runs, one while it is Pending. As shipped each waits for 600 s."""
    prompts = ["it lives", "it goes silent", "it stays pending"]
    (tmp_path / "three.txt").write_text("\n".join(prompts))
    requests = live.shard_requests(parameters | {"root": str(tmp_path / "root"),
                                                 "prompts": str(tmp_path / "three.txt")})
    ship(workers, f"automations(silent_seconds={SILENT_SECONDS})[:1]")
    workers.fault("hold", 0, prompts[0])
    workers.fault("hold", 1, prompts[1])
    living, silent = (workers.start("hgdpo-shard/shard", {"request": request}) for request in requests[:2])
    workers.until("both held", lambda: {*prompts[:2]} <= {*workers.painted()})
    workers.kill_with_worker(silent)

    (workers.faults / "hold-import").touch()
    ship(workers, f"automations(pending_seconds={PENDING_SECONDS})[1:]")
    pending = workers.start("hgdpo-shard/shard", {"request": requests[2]})
    workers.until("a process of the pending run", lambda: workers.process_of(pending))
    workers.kill_with_worker(pending)
    (workers.faults / "hold-import").unlink()

    ends = [workers.await_final(run) for run in (silent, pending)]
    assert [end["state_type"] for end in ends] == ["CRASHED", "CRASHED"]
    assert ends[0]["state"]["message"].startswith(f"No heartbeat for {SILENT_SECONDS} s:")
    assert ends[1]["state"]["message"].startswith(f"Pending for {PENDING_SECONDS} s:")
    assert workers.run(living)["state_type"] == "RUNNING"
    ship(workers, "automations()")
    workers.release("hold", 0)
    workers.release("hold", 1)
    assert workers.await_final(living)["state_type"] == "COMPLETED"


def ship(workers, automations):
    """Create or replace automations on the live server; `automations` is an expression of a list of them."""
    code = f"from deployments.automations import automations, ship; ship({automations})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=local.ROOT,
                   env=local._environment(workers.local, workers.local.url))
