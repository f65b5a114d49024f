"""What makes the missing shards and models: this process, or workers elsewhere."""

from collections.abc import Sequence
from typing import Protocol

from hgdpo_core.execution.jobs import cut, run_shards, write_recipe
from hgdpo_core.progress import Progress, ShouldStop, StageProgress, never_stop, silent, silent_stages
from hgdpo_core.stages import Stage
from hgdpo_core.training.request import TrainRequest, run_train
from hgdpo_core.training.tune import Tuned


class Runner(Protocol):
    """Makes what is missing of stages. StoppedError when it was asked to stop; what is finished is kept."""

    copy_to_store: bool
    """Whether workers may be on other machines, so that models and images have to be in the store."""

    def make(self, stages: Sequence[Stage], on: StageProgress = silent_stages) -> list[int]:
        """Returns when nothing of any stage is missing, how many shards of each were; each shows its own progress.

        The stages do not need each other, so they may be made in parallel.
        """
        ...

    def train(self, request: TrainRequest, progress: Progress) -> Tuned:
        """Train, or return the result of an earlier training."""
        ...


class InProcess:
    """The runner that makes everything in this process."""

    copy_to_store = False

    def __init__(self, should_stop: ShouldStop = never_stop):
        self.should_stop = should_stop

    def make(self, stages: Sequence[Stage], on: StageProgress = silent_stages) -> list[int]:
        return [make_here(stage, on, self.should_stop) for stage in stages]

    def train(self, request: TrainRequest, progress: Progress = silent) -> Tuned:
        return run_train(request, progress=progress, should_stop=self.should_stop)


def make_here(stage: Stage, on: StageProgress = silent_stages, should_stop: ShouldStop = never_stop) -> int:
    """Make a stage in this process by the request that a worker would get; returns how many shards were missing."""
    missing = stage.find_missing()
    if missing:
        write_recipe(stage)
        with on(stage.title) as progress:
            for request in cut(stage, missing):
                run_shards(request, progress=progress, should_stop=should_stop)
    return len(missing)


IN_PROCESS = InProcess()
