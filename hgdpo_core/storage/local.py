"""Objects as files below a local folder. What is written appears whole or not at all, and survives a power cut."""

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from hgdpo_core.storage.keys import TEMPORARY_PREFIX, Entries, Tree, checked


class LocalFiles:
    """The requests of a Store, each carried out once on files below `folder`."""

    def __init__(self, folder: Path):
        self._folder = folder

    def path(self, key: str) -> Path:
        return self._folder / checked(key)

    def size(self, key: str) -> int | None:
        path = self.path(key)
        return path.stat().st_size if path.is_file() else None

    head = size

    def read(self, key: str) -> bytes:
        with open_file(self.path(key)) as file:
            return file.read()

    def read_range(self, key: str, start: int, end: int) -> bytes:
        with open_file(self.path(key)) as file:
            file.seek(start)
            return file.read(end - start)

    def write(self, key: str, data: bytes) -> None:
        write_atomically(self.path(key), lambda file: file.write(data))

    def put_file(self, source: Path, key: str) -> None:
        with open_file(source) as data:
            write_atomically(self.path(key), lambda file: shutil.copyfileobj(data, file))

    def delete(self, key: str) -> None:
        self.path(key).unlink()

    def rename(self, key: str, new_key: str) -> None:
        path, target = self.path(key), self.path(new_key)
        _make_folder(target.parent)
        os.replace(path, target)
        _sync_folder(target.parent)
        _sync_folder(path.parent)

    def entries(self, folder: str) -> Entries:
        found: Entries = []
        with os.scandir(self.path(folder)) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):    # renamed or removed while we looked
                    found.append((entry.name, entry.is_dir(), entry.stat().st_size))
        return found

    def walk(self, folder: str) -> Tree:
        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        top = self.path(folder)
        found: Tree = []
        for parent, _, names in os.walk(top, onerror=refuse):
            for path in (Path(parent, name) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((path.relative_to(top).as_posix(), status.st_size, status.st_mtime))
        return found


def open_file(path: Path) -> BinaryIO:
    """A file to read. OSError for a pipe, which may wait for ever, but for one of this process: `<(command)`."""
    if stat.S_ISFIFO(path.stat().st_mode) and path.parent != Path("/dev/fd"):
        raise OSError(errno.EINVAL, "a pipe is in the place of a file")
    return path.open("rb")


def write_atomically(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Create or replace the file at `path` with what `fill` writes, in one step once all of it is on disk."""
    _make_folder(path.parent)
    temporary = path.with_name(TEMPORARY_PREFIX + uuid.uuid4().hex)
    try:
        with temporary.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Without it a power cut can take back a rename that already returned."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
