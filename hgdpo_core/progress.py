"""How programs tell their caller where they are, and ask whether to go on. No program prints by itself."""

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Called after each piece of work, often; must be cheap."""

    def __call__(self, done: int, total: int, unit: str) -> None:
        """`done` of `total` pieces are finished; `unit` names them in the plural, for example "images"."""


ShouldStop = Callable[[], bool]
"""Asked between batches and steps; True ends the work with StoppedError after what is finished is kept."""


def silent(done: int, total: int, unit: str) -> None:
    """The default progress: nobody is listening."""


def never_stop() -> bool:
    """The default answer: go on."""
    return False
