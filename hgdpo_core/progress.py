"""How programs tell their caller where they are, and ask whether to go on. No program prints by itself."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Called after each piece of work, often; must be cheap."""

    def __call__(self, done: int, total: int, unit: str) -> None:
        """`done` of `total` pieces are finished; `unit` names them in the plural, for example "images"."""


ShouldStop = Callable[[], bool]
"""Asked between batches and steps; True ends the work with StoppedError after what is finished is kept."""


StageProgress = Callable[[str], AbstractContextManager[Progress]]
"""Opens the progress of a stage by its name."""


def silent(done: int, total: int, unit: str) -> None:
    """The default progress: nobody is listening."""


@contextmanager
def silent_stages(stage: str) -> Iterator[Progress]:
    """The default of several stages: nobody is listening to any."""
    yield silent


def never_stop() -> bool:
    """The default answer: go on."""
    return False
