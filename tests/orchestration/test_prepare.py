"""An empty server is made ready by one command, and `prefect deploy --all` in a fresh clone registers the rest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from deployments.automations import automations
from deployments.pools import POOLS
from deployments.prepare import create_pools, main

ROOT = Path(__file__).parents[2]


def test_a_server_is_prepared_once_and_again(server):
    """Prefect's server checks the template; twice leaves one of each, and a filled-in notification as it is."""
    def existing():
        with get_client(sync_client=True) as client:
            return {pool.name: pool for pool in client.read_work_pools()}

    try:
        arguments = ["--type", "kubernetes", "--base-job-template", str(ROOT / "deployments" / "kubernetes.json")]
        main(arguments)
        notify = automations()[-1].read(name=automations()[-1].name)
        notify.enabled = True
        notify.update()
        main(arguments)
        pools = existing()
        assert {pool.name for pool in POOLS} <= pools.keys()
        assert pools["hgdpo-train"].concurrency_limit == 1
        gpus = {name: pool.base_job_template["variables"]["properties"]["gpus"]["default"]
                for name, pool in pools.items() if name.startswith("hgdpo-")}
        assert gpus == {"hgdpo-cpu": 0, "hgdpo-gpu": 1, "hgdpo-train": 1}
        with pytest.raises(SystemExit, match="exists as kubernetes, not process"):
            create_pools()
        with get_client(sync_client=True) as client:
            names = [one["name"] for one in client.request("POST", "/automations/filter", json={}).json()]
        assert sorted(names) == sorted(one.name for one in automations())
        assert notify.read(name=notify.name).enabled
    finally:
        with get_client(sync_client=True) as client:
            for pool in POOLS:
                client.delete_work_pool(pool.name)
            for one in client.request("POST", "/automations/filter", json={}).json():
                client.request("DELETE", f"/automations/{one['id']}")


@pytest.mark.slow
def test_a_fresh_clone_is_deployed_whole(server, tmp_path):
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], check=True)
    environment = os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value(), "PYTHONPATH": str(tmp_path / "clone")}
    for command in ("deployments.prepare", "prefect --no-prompt deploy --all"):
        done = subprocess.run([sys.executable, "-m", *command.split()], cwd=tmp_path / "clone", env=environment,
                              text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
    listed = subprocess.run([sys.executable, "-m", "prefect", "automation", "ls"], env=environment | {"COLUMNS": "400"},
                            text=True, capture_output=True, check=True).stdout
    assert [listed.count(automation.name) for automation in automations()] == [1, 1, 1]
    head = subprocess.run(["git", "describe", "--tags", "--always"], cwd=ROOT, text=True, capture_output=True)
    with get_client(sync_client=True) as client:
        deployments = client.request("POST", "/deployments/filter", json={}).json()
    names = sorted(one["name"] for one in deployments)
    assert names == ["create", "evaluate", "full", "nightly", "paper", "personalise", "shard", "train"]
    assert {one["version"] for one in deployments} == {head.stdout.strip()}
