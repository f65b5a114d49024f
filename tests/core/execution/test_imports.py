"""The heavy libraries, imported quickly, and only by processes that work."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import gc, json, os, sys
{}
print(json.dumps({{"enabled": gc.isenabled(), "frozen": gc.get_freeze_count(), "torch": "torch" in sys.modules,
                   "memory": os.environ.get("PYTORCH_ALLOC_CONF")}}))
"""
KEPT = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")}


def state_after(line: str, **environment: str) -> dict:
    said = subprocess.run([sys.executable, "-c", CODE.format(line)], capture_output=True, text=True, check=True,
                          env={**KEPT, **environment})
    return json.loads(said.stdout)


def test_they_are_left_out_of_the_collection_which_goes_on():
    found = state_after("from hgdpo_core.execution.imports import load_libraries; load_libraries()")
    assert found["torch"] and found["enabled"]
    assert found["frozen"] > 100_000
    assert found["memory"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_how_gpu_memory_is_taken_stays_the_users_choice(name):
    line = "from hgdpo_core.execution.imports import load_libraries; load_libraries()"
    assert state_after(line, **{name: "max_split_size_mb:128"})["memory"] != "expandable_segments:True"


def test_an_import_alone_changes_nothing():
    assert state_after("import hgdpo_core.execution.imports") == {"enabled": True, "frozen": 0, "torch": False,
                                                                   "memory": None}


def test_a_workers_process_loads_them_before_its_flow():
    assert state_after("import flows")["frozen"] == 0
    found = state_after("import flows", PREFECT__FLOW_RUN_ID="0f0f0f0f-0000-0000-0000-000000000000")
    assert found["torch"] and found["frozen"] > 100_000
