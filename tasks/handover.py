"""Inputs that a command opened before it started Prefect, for the flow in the same process: none is opened twice.

On a worker, and where a flow is called by itself, nothing is kept here and the flow opens its inputs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from hgdpo_core.config.base import canonical_json

T = TypeVar("T")
_opened: dict[tuple[str, str], Any] = {}


@contextmanager
def handed_over(opener: Callable[..., T], parameters: Mapping[str, Any], opened: T) -> Iterator[None]:
    """Inside the block, what `opener(**parameters)` returned is kept for the flow that opens the same."""
    key = _key(opener, parameters)
    _opened[key] = opened
    try:
        yield
    finally:
        _opened.pop(key, None)


def take_opened(opener: Callable[..., T], **parameters: Any) -> T:
    """What was handed over, once; else it is opened here, with the opener's errors."""
    key = _key(opener, parameters)
    return _opened.pop(key) if key in _opened else opener(**parameters)


def _key(opener: Callable[..., Any], parameters: Mapping[str, Any]) -> tuple[str, str]:
    return opener.__qualname__, canonical_json(parameters)
