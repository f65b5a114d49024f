"""How long the stages of a flow took, whose tasks open their progress themselves."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hgdpo_core import progress
from tasks.ui import watch_work


class StageTimes(progress.StageTimes):
    """Learns from `tasks.ui.stage_progress` whether a stage did work."""

    @contextmanager
    def stage(self, name: str, *, makes: bool = True, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
        with super().stage(name, makes=makes, clock=clock), watch_work() as worked:
            yield
            self.worked = bool(worked)
