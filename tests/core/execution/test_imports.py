"""The heavy libraries, imported quickly, and only by processes that work."""

import json
import os
import subprocess
import sys

CODE = """
import gc, json, sys
{}
print(json.dumps({{"enabled": gc.isenabled(), "frozen": gc.get_freeze_count(), "torch": "torch" in sys.modules}}))
"""


def state_after(line: str, **environment: str) -> dict:
    said = subprocess.run([sys.executable, "-c", CODE.format(line)], capture_output=True, text=True, check=True,
                          env={**os.environ, **environment})
    return json.loads(said.stdout)


def test_they_are_left_out_of_the_collection_which_goes_on():
    found = state_after("from hgdpo_core.execution.imports import load_libraries; load_libraries()")
    assert found["torch"] and found["enabled"]
    assert found["frozen"] > 100_000


def test_an_import_alone_changes_nothing():
    assert state_after("import hgdpo_core.execution.imports") == {"enabled": True, "frozen": 0, "torch": False}


def test_a_workers_process_loads_them_before_its_flow():
    assert state_after("import flows")["frozen"] == 0
    found = state_after("import flows", PREFECT__FLOW_RUN_ID="0f0f0f0f-0000-0000-0000-000000000000")
    assert found["torch"] and found["frozen"] > 100_000
