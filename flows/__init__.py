"""The stages in order. `full.py` is the whole pipeline; start there."""

import os

if "PREFECT__FLOW_RUN_ID" in os.environ:  # a worker started this process for one flow run
    from hgdpo_core.execution.imports import load_libraries

    load_libraries()  # before a flow's file imports them slowly
