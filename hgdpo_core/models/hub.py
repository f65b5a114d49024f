"""The Hugging Face libraries, kept quiet, and what their errors say."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without bars and without reports on tensors: what matters of them is an error of ours."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What another library's error says, cut to one line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
