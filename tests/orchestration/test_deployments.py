"""What is deployed where, and the local server."""

import importlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from prefect.states import InfrastructurePending, Pending, Submitting
from prefect.utilities.callables import parameter_schema

from deployments import automations as automation_module
from deployments import files, local, steps
from deployments.automations import PENDING_SECONDS, SILENT_SECONDS, automations
from deployments.local import TOML_MARK, Local, LocalError
from deployments.pools import POOLS
from deployments.steps import enter_checkout, find_version
from hgdpo_core import __version__

ROOT = Path(__file__).parents[2]
SHIPPED = yaml.safe_load((ROOT / "prefect.yaml").read_text())
BY_NAME = {deployment["name"]: deployment for deployment in SHIPPED["deployments"]}
FLOWS = {"full": "hgdpo", "shard": "hgdpo-shard", "train": "hgdpo-train", "nightly": "hgdpo-rescore",
         "paper": "hgdpo-ablate", "evaluate": "hgdpo-evaluate", "personalise": "hgdpo-personalise",
         "create": "hgdpo-study"}


def test_the_deployments_are_those_of_the_contract():
    assert BY_NAME.keys() == FLOWS.keys()


@pytest.mark.parametrize("name", FLOWS)
def test_an_entrypoint_is_a_module_with_the_flow(name):
    module, _, function = BY_NAME[name]["entrypoint"].partition(":")
    assert "/" not in module  # a file would break retries in other processes
    flow = getattr(importlib.import_module(module), function)
    assert flow.name == FLOWS[name]
    form = parameter_schema(flow).properties    # what the UI asks for
    assert name in ("shard", "train") or all(field.get("description") for field in form.values()), form


def test_parents_never_share_a_pool_with_their_children():
    pools = {name: deployment["work_pool"]["name"] for name, deployment in BY_NAME.items()}
    assert pools.pop("shard") == "hgdpo-gpu" and pools.pop("train") == "hgdpo-train"
    assert set(pools.values()) == {"hgdpo-cpu"}
    assert {pool.name: pool.limit for pool in POOLS} == {"hgdpo-cpu": None, "hgdpo-gpu": None, "hgdpo-train": 1}
    started = {workers.pool.name: workers for workers in local._workers(Local(), [])}
    assert started.keys() == {pool.name for pool in POOLS}
    assert (started["hgdpo-gpu"].limit, started["hgdpo-gpu"].count) == (1, 2)
    assert {workers.pool.name: workers.count for workers in local._workers(Local(), ["0", "1", "2"])}["hgdpo-gpu"] == 3


def test_every_deployment_sends_heartbeats_often_enough_for_the_automations():
    for deployment in BY_NAME.values():
        seconds = int(deployment["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
        assert 10 * seconds <= SILENT_SECONDS
    silent, pending, notify = automations()
    assert silent.enabled and pending.enabled and not notify.enabled
    assert silent.trigger.expect == pending.trigger.expect == {"prefect.flow-run.*"}
    assert silent.trigger.within.total_seconds() == SILENT_SECONDS == 600 == PENDING_SECONDS
    assert silent.trigger.after == {"prefect.flow-run.heartbeat"}
    names = {Pending().name, Submitting().name, InfrastructurePending().name}  # all are of the type Pending
    assert pending.trigger.after == {f"prefect.flow-run.{name}" for name in names}
    assert {action.state.value for automation in (silent, pending) for action in automation.actions} == {"CRASHED"}


def test_the_windows_of_the_automations_can_be_chosen(monkeypatch):
    shipped = []
    monkeypatch.setattr(automation_module, "ship", shipped.extend)
    automation_module.main(["--pending-seconds", "3600"])
    assert [automation.trigger.within.total_seconds() for automation in shipped] == [SILENT_SECONDS, 3600, 0]
    assert "Pending for 3600 s" in shipped[1].actions[0].message


def test_the_nightly_run_ships_paused_with_a_time_zone_and_never_twice():
    schedule, = BY_NAME["nightly"]["schedules"]
    assert schedule["active"] is False and schedule["timezone"] == "Europe/Berlin" and schedule["cron"]
    assert BY_NAME["nightly"]["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert BY_NAME["full"]["concurrency_limit"]["limit"] == 1


def test_every_deployment_has_gits_version_and_asks_for_no_schedule():
    """One without `schedules` makes `prefect deploy` ask for them in a terminal."""
    assert {deployment["version"] for deployment in BY_NAME.values()} == {"{{ code.version }}"}
    assert all("schedules" in deployment for deployment in BY_NAME.values())


def test_a_worker_enters_the_checkout_it_imports_from():
    assert enter_checkout() == {"directory": str(ROOT)}


def test_the_version_is_gits_and_without_a_checkout_the_packages(tmp_path, monkeypatch):
    for arguments in (["init", "-q"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty",
                                       "-m", "first"], ["tag", "v1/rc"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(steps, "__file__", str(tmp_path / "deployments" / "steps.py"))
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert find_version() == {"version": "v1/rc", "commit": head, "tag": "v1-rc"}
    monkeypatch.setattr(steps, "__file__", str(tmp_path / "site" / "deployments" / "steps.py"))
    assert find_version() == {"version": __version__, "commit": "", "tag": __version__}


def test_the_files_are_written_where_the_user_stands_and_changed_ones_stay(tmp_path, capsys):
    assert files.main([str(tmp_path)]) == 0 == files.main([str(tmp_path)])
    assert (tmp_path / "prefect.yaml").read_text() == (ROOT / "prefect.yaml").read_text()
    (tmp_path / "prefect.yaml").write_text("mine")
    assert files.main([str(tmp_path)]) == 1
    assert "error: kept " in capsys.readouterr().err and (tmp_path / "prefect.yaml").read_text() == "mine"


# -- the local server


def test_the_users_own_prefect_is_kept_out(monkeypatch, tmp_path):
    for name in ("PREFECT_API_KEY", "PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_PROFILE"):
        monkeypatch.setenv(name, "the user's")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "passes")
    environment = local._environment(Local(home=tmp_path), "http://127.0.0.1:4321/api")
    assert "the user's" not in environment.values() and environment["AWS_ACCESS_KEY_ID"] == "passes"
    assert environment["PREFECT_HOME"] == str(tmp_path)
    assert environment["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"


def test_a_foreign_prefect_toml_is_left_alone(tmp_path):
    here = Local(home=tmp_path / "home", toml=tmp_path / "prefect.toml")
    here.toml.write_text("[api]\nurl = 'http://mine'\n")
    with pytest.raises(LocalError, match="not written by `make up`"):
        local.up(here)
    local.down(here)
    assert "mine" in here.toml.read_text()


def test_down_removes_what_an_interrupted_up_left(tmp_path):
    here = Local(home=tmp_path, toml=tmp_path / "prefect.toml")
    here.toml.write_text(f"{TOML_MARK}\n")
    here.record.write_text('{"url": "http://127.0.0.1:9/api"}')
    assert local.down(here) == 0
    assert not here.toml.exists() and not here.record.exists()


def test_down_ends_a_server_that_cannot_end_its_runs(tmp_path, monkeypatch, capsys):
    here = Local(home=tmp_path, toml=tmp_path / "prefect.toml")
    here.record.write_text('{"url": "http://127.0.0.1:9/api"}')
    lasting = [sys.executable, "-c", "import time; time.sleep(600)"]
    processes = [subprocess.Popen([*lasting, *more], env=os.environ | {local.MARK: str(tmp_path)})
                 for more in (["server", "start"], ["worker"])]

    def fail(*_):
        raise LocalError("it answered 500")

    monkeypatch.setattr(local, "_healthy", lambda url: True)
    monkeypatch.setattr(local, "_run_inside", fail)
    assert local.down(here) == 2
    assert not any(psutil.pid_exists(process.pid) for process in processes) and not here.record.exists()
    assert "make up`: it answered 500" in capsys.readouterr().err


def test_schedule_without_a_server_says_what_to_do(tmp_path, capsys):
    assert local.main(["schedule", "--home", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: no local Prefect server is up: run `make up`\n"


def test_a_taken_port_is_seen():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert not local._is_free(taken.getsockname()[1])


def test_another_program_on_the_port_is_no_healthy_server():
    with socket.create_server(("127.0.0.1", 0)) as other:
        thread = threading.Thread(target=lambda: other.accept()[0].sendall(b"220 ready\r\n"))
        thread.start()
        assert not local._healthy(f"http://127.0.0.1:{other.getsockname()[1]}/api")
        thread.join()


@pytest.mark.parametrize(("variables", "seen", "names"), [
    ({}, 2, ["0", "1"]), ({}, 0, []),
    ({"CUDA_VISIBLE_DEVICES": "2,5"}, 2, ["2", "5"]),
    ({"CUDA_VISIBLE_DEVICES": ""}, 0, []), ({"CUDA_VISIBLE_DEVICES": "-1"}, 0, []),
    ({"CUDA_VISIBLE_DEVICES": "3,-1,4"}, 1, ["3"]),                       # -1 ends the list
    ({"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}, 1, ["MIG-a", "MIG-b"]),     # a process sees one of them
    ({"CUDA_VISIBLE_DEVICES": "MIG-a"}, 0, []),
    ({"HIP_VISIBLE_DEVICES": "4,6", "CUDA_VISIBLE_DEVICES": "0"}, 2, ["4", "6"]),
    ({"HGDPO_DEVICE": "cpu"}, 8, []),
])
def test_gpus_are_those_the_shell_may_use(monkeypatch, variables, seen, names):
    """`seen` is what torch counts under these variables."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "HGDPO_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(local, "COUNT_GPUS", f"print({seen})")
    assert local._gpus() == names


def test_gpus_are_counted_by_torch_in_a_process_of_its_own(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "HGDPO_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    assert len(local._gpus()) == torch.cuda.device_count()
    monkeypatch.setattr(local, "COUNT_GPUS", "import torch_is_not_here")
    with pytest.raises(local.LocalError, match="torch cannot count the GPUs: ModuleNotFoundError"):
        local._gpus()
