"""The Hugging Face libraries, without their bars and warnings, and downloads from the hub."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from hgdpo_core.errors import ModelError, first_line
from hgdpo_core.models.weight_files import WEIGHT_SUFFIXES

__all__ = ["find_or_download", "first_line", "looks_like_hub_id", "quiet_transformers"]

LIBRARIES = (diffusers_logging, transformers_logging)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """diffusers and transformers without bars and warnings: what matters of them is an error of ours."""
    levels = [library.get_verbosity() for library in LIBRARIES]
    for library in LIBRARIES:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(LIBRARIES, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def looks_like_hub_id(source: str) -> bool:
    """Whether a source that is not a path here can be owner/name on the hub."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not source.endswith(WEIGHT_SUFFIXES)


def find_or_download(what: str, source: str, download: Callable[[], object], expected: str, advice: str = "") -> Path:
    """A path of this machine, or the folder that `download` returns for a hub id; ModelError, in one line, if neither.

    `what` and `source` begin the message, `expected` and `advice` end it.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not looks_like_hub_id(source):
        raise ModelError(f"{what} {source} does not exist: expected {expected}")
    try:
        return Path(str(download()))
    except Exception as error:  # the hub client raises a wide family: all mean "could not be downloaded"
        raise ModelError(f"{what} {source} is not a local folder and could not be downloaded from the hub: "
                         f"{first_line(error)}{advice}") from None
