"""Every file below a local folder as users keep them: links followed, loops ended, what is not a file counted."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hgdpo_core.errors import InputError
from hgdpo_core.storage.keys import Tree


def local_tree(folder: Path, *, leave_out: Path | None = None) -> tuple[Tree, Counter[str]]:
    """(relative path, bytes, last change) of the files below, and how many entries were skipped for what reason.

    `leave_out`: a folder, such as the root of a store, that is left out. InputError for a folder that cannot
    be read.
    """
    found: Tree = []
    skipped: Counter[str] = Counter()
    left_out = leave_out and os.path.realpath(leave_out)
    for path, status in _entries(str(folder), (), left_out, skipped):
        name = os.path.relpath(path, folder)
        reason = _unusable(name, status)
        if reason:
            skipped[reason] += 1
        else:
            found.append((name, status.st_size, status.st_mtime))
    return found, skipped


def _entries(folder: str, above: tuple[str, ...], left_out: str | None,
             skipped: Counter[str]) -> Iterator[tuple[str, os.stat_result]]:
    above = (*above, os.path.realpath(folder))
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"images: {folder} cannot be read: {error.strerror}") from None
    for entry in entries:
        try:
            status = entry.stat()
        except OSError:
            skipped["links to nothing"] += 1
            continue
        if not stat.S_ISDIR(status.st_mode):
            yield entry.path, status
        elif os.path.realpath(entry.path) == left_out:
            skipped["the root of the results"] += 1
        elif os.path.realpath(entry.path) in above:
            skipped["links to a folder above"] += 1
        else:
            yield from _entries(entry.path, above, left_out, skipped)


def _unusable(name: str, status: os.stat_result) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return "pipes, sockets and devices"
    if os.path.basename(name).startswith("._"):
        return "._ files of a Mac"
    if "\\" in name:
        return "names with a backslash (rename them)"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "names that are not UTF-8 (rename them)"
    return None
