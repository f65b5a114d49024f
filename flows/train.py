"""One training as a flow run of its own: on the worker that has all GPUs of its machine; Retry resumes it."""

from typing import Any

from prefect import flow
from prefect.states import State

from flows.lifecycle import run_watched
from hgdpo_core.training.request import TrainRequest
from tasks.training import make_tuned
from tasks.ui import explain_own_errors


@flow(name="hgdpo-train")
def hgdpo_train(request: TrainRequest) -> str | State[Any]:
    """SFT or DPO, from the last checkpoint where there is one; returns the tuned model's id."""
    explain_own_errors()
    return run_watched(lambda watch: make_tuned(request, watch))
