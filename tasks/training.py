"""Train what a request names: the work of a training flow run."""

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core.progress import ShouldStop
from hgdpo_core.training.launch import run_train_everywhere
from hgdpo_core.training.request import TrainRequest
from tasks.options import STAGE
from tasks.ui import stage_progress
from tasks.validation import training_progress


@task(name="train", task_run_name="{request.kind}", **STAGE)
def make_tuned(request: TrainRequest, should_stop: ShouldStop) -> str:
    """The id of the tuned model in `models/`."""
    with stage_progress("encode") as encoding, training_progress(request) as progress:
        tuned = run_train_everywhere(request, progress=progress, encode_progress=encoding, should_stop=should_stop)
    get_run_logger().info("%s: %s %s", request.kind, "existing" if tuned.found else "trained", tuned.model_id)
    return tuned.model_id
