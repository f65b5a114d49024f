"""Who makes what is missing: this process, or workers elsewhere."""

from collections.abc import Sequence
from typing import Protocol

from hgdpo_core.execution.jobs import Work, run_shards
from hgdpo_core.progress import Progress, ShouldStop, StageProgress, never_stop, silent, silent_stages
from hgdpo_core.training.request import TrainRequest, run_train
from hgdpo_core.training.tune import Tuned


class Runner(Protocol):
    """Makes what is missing of some work. StoppedError when it was asked to stop; what is finished is kept."""

    share: bool
    """Whether workers may be on other machines, so that models and images have to be in the store."""

    def make(self, works: Sequence[Work], stages: StageProgress = silent_stages) -> None:
        """Returns when nothing of any work is missing any more; each shows its progress under its title.

        The works are of one stage and do not need each other, so they may be made side by side.
        """
        ...

    def train(self, request: TrainRequest, progress: Progress, encode_progress: Progress = silent) -> Tuned:
        """Train, or find what an earlier training gave."""
        ...


class InProcess:
    """The runner that makes everything in this process."""

    share = False

    def __init__(self, should_stop: ShouldStop = never_stop):
        self.should_stop = should_stop

    def make(self, works: Sequence[Work], stages: StageProgress = silent_stages) -> None:
        for work in works:
            with stages(work.title) as progress:
                for request in work.cut():
                    run_shards(request, progress=progress, should_stop=self.should_stop)

    def train(self, request: TrainRequest, progress: Progress = silent, encode_progress: Progress = silent) -> Tuned:
        return run_train(request, progress=progress, encode_progress=encode_progress, should_stop=self.should_stop)


IN_PROCESS = InProcess()
