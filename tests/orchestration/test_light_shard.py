"""The light shard run of the benchmark of orchestration makes what its pool waits for, without torch."""

import subprocess
import sys
from pathlib import Path

from hgdpo_core.execution import jobs
from hgdpo_core.stages import pool as pool_stage

ROOT = Path(__file__).parents[2]


def test_it_commits_the_shards_of_its_request(server, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_stage, "ImageGenerator", pool_stage.ImageGenerator)  # null_shard puts others in place
    monkeypatch.setattr(jobs, "MAX_SHARD_RUNS", 2)
    from benchmarks import light_shard, null_shard

    monkeypatch.setattr(jobs, "MAX_SHARD_RUNS", 1_000_000)  # imported before or not
    pool = null_shard.plan(f"file://{tmp_path}", 4)
    requests = jobs.cut(pool, pool.indices, 1)
    assert [request.indices for request in requests] == [[0], [1], [2], [3]]
    rows = light_shard.hgdpo_shard(requests[1].model_dump(mode="json"))
    assert [row["shard"] for row in rows] == [1] and pool.find_missing() == [0, 2, 3]


def test_it_loads_no_torch():
    code = "import sys, benchmarks.light_shard; print({'torch', 'diffusers', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
