"""The parent's side of shard runs: attach, start, wait, start again, fail with names. The server is a small fake."""

import logging
from datetime import timedelta
from types import SimpleNamespace
from uuid import uuid4

import httpx
import pytest
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry, Cancelled, Completed, Crashed, Failed, Pending, Running, Scheduled

from flows import children
from flows.children import Job, ShardRunsError, cancel_children, run_jobs
from hgdpo_core.config import WorkersConfig
from hgdpo_core.errors import ConfigError, StoppedError, StorageError


class Server:
    """Flow runs that live through a script of states, one step at each poll."""

    api_url = "http://fake/api"

    def __init__(self):
        self.runs, self.scripts, self.created, self.polls = {}, {}, [], 0
        self.deployed, self.down, self.on_poll = True, 0, lambda: None
        self.made = set()
        """Names of jobs whose work is there."""

    def add(self, name, *, state=None, key="", tags=(), request=None, script=(), count=1):
        run = SimpleNamespace(id=uuid4(), name=name, state=state or Scheduled(), idempotency_key=key, tags=list(tags),
                              parameters={"request": request}, run_count=count, total_run_time=timedelta(seconds=3))
        self.runs[run.id], self.scripts[run.id] = run, list(script)
        return run

    def step(self, seconds):
        self.polls += 1
        assert self.polls < 100, "waits for ever"
        self.on_poll()
        for run in self.runs.values():
            if self.scripts[run.id] and not run.state.is_final():
                following = self.scripts[run.id].pop(0)
                if following is not None:   # None: it stays as it is
                    self.set(run, following)

    def set(self, run, state):
        if callable(state):
            state(run)
        else:
            run.state = state.model_copy(update={"id": uuid4()})
            run.run_count += state.is_running()

    # -- what flows.children calls

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def read_deployment_by_name(self, name):
        if not self.deployed:
            raise ObjectNotFound(RuntimeError("404"))

    def read_flow_run(self, run_id):
        return self.runs[run_id]

    def read_flow_runs(self, *, flow_run_filter, limit, offset):
        if self.down:
            self.down -= 1
            raise httpx.ConnectError("refused")
        filters = flow_run_filter
        found = [run for run in self.runs.values()
                 if (filters.id is None or run.id in filters.id.any_)
                 and (filters.tags is None or set(filters.tags.any_) & set(run.tags))
                 and (filters.state is None or run.state.type in filters.state.type.any_)
                 and (filters.idempotency_key is None or run.idempotency_key in filters.idempotency_key.any_)
                 and (filters.parent_flow_run_id is None or "mine" in run.tags)]
        return found[offset:offset + limit]

    def set_flow_run_state(self, run_id, state):
        self.set(self.runs[run_id], state)

    def run_deployment(self, deployment, *, parameters, flow_run_name, tags, idempotency_key, timeout):
        assert timeout == 0 and idempotency_key not in {run.idempotency_key for run in self.runs.values()}
        self.created.append(flow_run_name)
        return self.add(flow_run_name, key=idempotency_key, tags=tags, request=parameters["request"],
                        script=self.fresh(flow_run_name), count=0)

    def fresh(self, name):
        return [Pending(), Running(), self.finish(name)]

    def finish(self, name):
        def end(run):
            self.made.add(name)
            self.set(run, Completed())
        return end


@pytest.fixture
def server(monkeypatch):
    fake = Server()
    monkeypatch.setattr(children, "get_client", lambda sync_client: fake)
    monkeypatch.setattr(children, "run_deployment", fake.run_deployment)
    monkeypatch.setattr(children, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(children, "url_for", lambda kind, run_id: f"http://fake/{run_id}")
    monkeypatch.setattr(children.time, "sleep", fake.step)
    return fake


def job(server, name):
    return Job(name=name, deployment="hgdpo-shard/shard", request={"shards": name}, tags=["pool"],
               tag=f"shard:pool-1:{name}", key=f"parent:{name}", is_done=lambda: name in server.made)


def run(server, *names, should_stop=lambda: False, **settings):
    jobs = [job(server, name) for name in names]
    run_jobs(jobs, WorkersConfig(**settings), should_stop=should_stop, on_change=lambda jobs: None)
    return jobs


def test_each_job_gets_one_run_and_its_work_is_awaited(server):
    jobs = run(server, "0", "1")
    assert server.created == ["0", "1"] and all(j.done for j in jobs)
    row = jobs[0].row()
    assert row["state"] == "Completed" and row["work"] == "done" and row["seconds"] == 3.0 and row["attempts"] == 1


def test_a_live_run_of_the_same_work_is_joined_no_matter_who_started_it(server):
    server.add("theirs", state=Running(), tags=["shard:pool-1:0"], request={"shards": "0"}, key="other:0",
               script=[server.finish("0")])
    run(server, "0", "1")
    assert server.created == ["1"]


def test_a_live_run_of_another_range_with_the_same_first_shard_is_not(server):
    server.add("theirs", state=Running(), tags=["shard:pool-1:0"], request={"shards": "0-9"}, key="other:0")
    run(server, "0")
    assert server.created == ["0"]


@pytest.mark.parametrize("ended", [Failed(), Crashed(), Cancelled(), Completed()])
def test_a_retried_parent_starts_its_own_ended_run_again_and_creates_none(server, ended):
    own = server.add("0", state=ended, key="parent:0", script=server.fresh("0"))
    run(server, "0")
    assert server.created == [] and own.run_count == 2 and own.state.is_completed()


def test_a_stranger_that_fails_is_replaced_by_a_run_of_our_own(server):
    server.add("theirs", state=Running(), tags=["shard:pool-1:0"], request={"shards": "0"}, key="other:0",
               script=[Failed()])
    run(server, "0")
    assert server.created == ["0"]


def test_completed_is_not_believed(server):
    server.fresh = lambda name: [Running(), Completed(), Running(), server.finish(name)]
    jobs = run(server, "0")
    assert server.created == ["0"] and jobs[0].row()["attempts"] == 2


def test_a_run_that_completes_twice_without_its_work_is_a_failure(server):
    server.fresh = lambda name: [Running(), Completed(), Running(), Completed()]
    with pytest.raises(ShardRunsError, match="1 of 1 shard runs failed"):
        run(server, "0")


def test_all_end_before_the_failed_ones_are_named(server):
    scripts = {"0": [Running(), Failed(message="ModelError: not finite")],
               "1": [Running(), Running(), Running(), server.finish("1")]}
    server.fresh = scripts.__getitem__
    with pytest.raises(ShardRunsError) as error:
        run(server, "0", "1")
    message = str(error.value)
    assert "1 of 2" in message and "'0' Failed: ModelError: not finite" in message and "press Retry" in message
    assert f"http://fake/{next(iter(server.runs))}" in message and server.made == {"1"}


def test_a_failure_whose_work_is_there_all_the_same_is_none(server):
    def crash_after_the_commit(run):
        server.made.add("0")
        server.set(run, Crashed())

    server.fresh = lambda name: [Running(), crash_after_the_commit]
    run(server, "0")


def test_a_crashed_run_is_a_warning_with_its_link_while_the_others_go_on(server, caplog):
    server.fresh = lambda name: ([Running(), Crashed(message="its worker is gone")] if name == "0"
                                 else [Running()] * 5 + [server.finish(name)])
    with pytest.raises(ShardRunsError, match="1 of 2"):
        run(server, "0", "1")
    crashed = next(one for one in server.runs.values() if one.name == "0")
    warning, = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert warning == ("0 ended as Crashed without its work (its worker is gone). Retry on it makes what is missing: "
                       f"http://fake/{crashed.id}")


def test_work_that_cannot_be_looked_at_is_missing(server):
    def look():
        raise StorageError("shard 3 of the pool does not exist")

    # Completed without its work: started once more, and then left to the user.
    server.fresh = lambda name: [Running(), server.finish(name), Running(), server.finish(name)]
    broken = job(server, "0")
    broken.is_done = look
    with pytest.raises(ShardRunsError, match="1 of 1"):
        run_jobs([broken], WorkersConfig(), should_stop=lambda: False, on_change=lambda jobs: None)


def test_a_run_that_is_retried_while_others_work_counts_as_live_again(server):
    def retry():
        failed = [r for r in server.runs.values() if r.state.is_failed()]
        for r in failed:
            server.scripts[r.id] = [Running(), server.finish("0")]
            server.set(r, AwaitingRetry())

    server.on_poll = lambda: retry() if server.polls == 4 else None
    scripts = {"0": [Running(), Failed()], "1": [Running()] * 8 + [server.finish("1")]}
    server.fresh = scripts.__getitem__
    jobs = run(server, "0", "1")
    assert all(j.done for j in jobs) and server.created == ["0", "1"]


def test_after_too_many_failures_no_further_run_starts(server):
    scripts = {"0": [Failed()], "1": [Failed()], "2": [Running(), Running(), server.finish("2")], "3": []}
    server.fresh = scripts.__getitem__
    with pytest.raises(ShardRunsError, match="3 of 4"):
        run(server, "0", "1", "2", "3", max_failed_shards=1)
    states = {r.name: r.state.name for r in server.runs.values()}
    assert states["3"] == "Cancelled" and states["2"] == "Completed"  # what runs is not disturbed


def test_no_more_runs_are_open_at_once_than_set(server):
    most = 0

    def count():
        nonlocal most
        most = max(most, sum(not run.state.is_final() for run in server.runs.values()))

    server.on_poll = count
    names = [str(n) for n in range(7)]
    assert all(j.done for j in run(server, *names, open_runs=3))
    assert server.created == names and most == 3


def test_runs_that_never_started_for_failures_are_named_after_the_failed_ones(server):
    server.fresh = lambda name: [Failed(message="no memory")]
    named = "'0' Failed: no memory; '1' Failed: no memory; '2' not started; '3' not started"
    with pytest.raises(ShardRunsError, match=rf"4 of 4 shard runs failed \({named}\)"):
        run(server, "0", "1", "2", "3", open_runs=1, max_failed_shards=1)
    assert server.created == ["0", "1"]


def test_a_run_that_stays_pending_is_crashed_so_that_it_can_be_retried(server, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(children.time, "monotonic", lambda: now[0])
    server.on_poll = lambda: now.__setitem__(0, now[0] + 100)
    # A new state Pending counts again: the first worker gave it back, and the second one is alive.
    scripts = {"0": [Pending(), Pending()], "1": [Pending(), None, None, None, Pending(), None, None, Running(),
                                                  server.finish("1")]}
    server.fresh = scripts.__getitem__
    with pytest.raises(ShardRunsError, match="1 of 2 shard runs failed .'0' Crashed: Pending for 450 s: its worker is"):
        run(server, "0", "1", pending_seconds=450)
    assert server.made == {"1"} and [r.state.name for r in server.runs.values()] == ["Crashed", "Completed"]


def test_a_server_that_is_away_for_a_while_is_waited_for(server):
    server.on_poll = lambda: setattr(server, "down", 2) if server.polls == 1 else None
    run(server, "0")
    assert server.made == {"0"}


def test_a_server_that_goes_away_while_runs_wait_to_be_started_is_waited_for_without_end(server, monkeypatch):
    refusals = [httpx.ConnectError("refused")] * 20

    def start(*args, **settings):
        if server.created and refusals:
            raise refusals.pop()
        return server.run_deployment(*args, **settings)

    monkeypatch.setattr(children, "run_deployment", start)
    monkeypatch.setattr(children, "PATIENCE_SECONDS", 0)
    run(server, "0", "1", open_runs=1)
    assert server.made == {"0", "1"} and not refusals


def test_a_stop_is_heeded_while_starting_and_while_waiting(server):
    with pytest.raises(StoppedError, match="waiting"):
        run(server, "0", should_stop=lambda: True)
    assert server.created == []
    with pytest.raises(StoppedError, match="waiting"):
        run(server, "0", "1", "2", should_stop=lambda: len(server.created) == 2)
    assert server.created == ["0", "1"]
    with pytest.raises(StoppedError, match="waiting"):
        run(server, "3", should_stop=lambda: "3" in server.created)
    assert server.created == ["0", "1", "3"]


def test_a_server_without_the_deployment_is_reported_in_one_line(server):
    server.deployed = False
    with pytest.raises(ConfigError, match=r"no deployment hgdpo-shard/shard: run `make up`"):
        run(server, "0")


def test_cancelling_children_touches_live_ones_only(server):
    live = [server.add("a", state=Running(), tags=["mine"]), server.add("b", tags=["mine"])]
    ended, other = server.add("c", state=Completed(), tags=["mine"]), server.add("d", state=Running())
    assert cancel_children(uuid4()) == 2
    assert [r.state.is_cancelling() for r in live] == [True, True]
    assert ended.state.is_completed() and other.state.is_running()
