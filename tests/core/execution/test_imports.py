"""The heavy libraries, imported quickly."""

import json
import subprocess
import sys

CODE = """
import gc, json, sys
import hgdpo_core.execution.imports

print(json.dumps({"enabled": gc.isenabled(), "frozen": gc.get_freeze_count(), "torch": "torch" in sys.modules}))
"""


def test_they_are_set_aside_and_the_collector_goes_on():
    said = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    found = json.loads(said)
    assert found["torch"] and found["enabled"]
    assert found["frozen"] > 100_000
