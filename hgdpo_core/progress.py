"""How programs report progress to their caller, and ask whether to stop; counts as words. No program prints itself."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol


class Progress(Protocol):
    """Called after each piece of work, often; must be cheap."""

    def __call__(self, done: int, total: int, unit: str) -> None:
        """`done` of `total` pieces are finished; `unit` names them in the plural, for example "images"."""


ShouldStop = Callable[[], bool]
"""Asked between batches and steps; True ends the work with StoppedError after what is finished is kept."""


StageProgress = Callable[[str], AbstractContextManager[Progress]]
"""Opens the progress of a stage by its name."""


def count_of(number: int, singular: str, plural: str | None = None) -> str:
    """1 prompt, 1,200 prompts."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def silent(done: int, total: int, unit: str) -> None:
    """The default progress: reports nothing."""


@contextmanager
def silent_stages(stage: str) -> Iterator[Progress]:
    """The default for several stages: reports nothing."""
    yield silent


def never_stop() -> bool:
    """The default: never stop."""
    return False


@dataclass
class StageTimes:
    """Seconds by stage, and the names of the stages that had nothing to make."""

    seconds: dict[str, float] = field(default_factory=dict)
    cached: list[str] = field(default_factory=list)
    worked: bool = False
    """Whether the present stage did any work."""

    @contextmanager
    def stage(self, name: str, *, makes: bool = True, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
        """Time a stage; one that `makes` something and reported no progress through `watch` counts as cached."""
        start, self.worked = clock(), False
        yield
        self.seconds[name] = round(clock() - start, 2)
        if makes and not self.worked:
            self.cached.append(name)

    def watch(self, stages: StageProgress) -> StageProgress:
        """`stages`, whose every report also marks the present stage as one that did work."""
        @contextmanager
        def watched(stage: str) -> Iterator[Progress]:
            with stages(stage) as progress:
                def report(done: int, total: int, unit: str) -> None:
                    self.worked = True
                    progress(done, total, unit)

                yield report

        return watched
