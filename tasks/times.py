"""How long each stage took, and which stages found all that they wanted."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from hgdpo_core.comparison_run import ComparisonRun
from hgdpo_core.errors import StorageError
from hgdpo_core.run import Run
from tasks.ui import watch_work


@dataclass
class StageTimes:
    """Seconds by stage, and the names of those that had nothing to make."""

    seconds: dict[str, float] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, *, makes: bool = True, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
        """Time a stage; one that `makes` something and showed no work has found it all."""
        start = clock()
        with watch_work() as worked:
            yield
        self.seconds[name] = round(clock() - start, 2)
        if makes and not worked:
            self.found.append(name)

    def recorded(self, run: Run | ComparisonRun) -> dict[str, float]:
        """The seconds, but for what was found those in which an earlier run of the same settings made it."""
        earlier: dict[str, float] = {}
        with suppress(StorageError):    # none yet, or not readable: this run's times are all there is
            earlier = run.store.read_json(run.key("summary.json"))["timings"]
        return {name: earlier.get(name, seconds) if name in self.found else seconds
                for name, seconds in self.seconds.items()}
