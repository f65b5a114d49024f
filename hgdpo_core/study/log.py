"""The log of votes on this machine's disk: a vote is there before it is acknowledged, and survives kill -9.

A folder of segments, JSON lines each. A start recovers all segments and opens a new one. Closed segments are deleted
once their votes are in the store. Votes that arrive together share one fsync.
"""

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from hgdpo_core.errors import InputError, StorageError, first_line
from hgdpo_core.storage.local import write_atomically

Record = Mapping[str, Any]
SEGMENT = "votes-{:08d}.jsonl"


class VoteLog:
    """Appends records durably. For one process at a time; its methods may be called from any thread."""

    def __init__(self, folder: Path):
        """InputError where another process has the log open, StorageError where the folder cannot be written."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder / "lock")
            self.writer = _writer_name(folder / "writer")
            self.recovered = list(read_segments(segments(folder)))
            """Records of earlier processes whose segments were not deleted yet."""
            self._number = max((_number(path) for path in segments(folder)), default=0)
            self._open_next()
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise _refusal(folder, error) from None
        self._queue: SimpleQueue[tuple[Record | None, Future]] = SimpleQueue()
        self._thread = Thread(target=self._work, name="votes", daemon=True)
        self._thread.start()

    def append(self, record: Record) -> "Future[None]":
        """Done once the record is on disk; StorageError, in the future, where it could not be written."""
        return self._ask(record)

    def rotate(self) -> "list[Path]":
        """Close the segment, if it has records, and begin another; all closed segments, in their order."""
        return self._ask(None).result()

    def delete(self, closed: Sequence[Path]) -> None:
        """Remove closed segments, whose votes are in the store."""
        for path in closed:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Finish what was appended, and let other processes have the log."""
        self._queue.put((None, _LAST))
        self._thread.join()
        os.close(self._file)
        if self._size == 0:
            self._path.unlink(missing_ok=True)
        os.close(self._lock)

    # -- in the thread

    def _ask(self, record: Record | None) -> Future:
        future: Future = Future()
        self._queue.put((record, future))
        return future

    def _work(self) -> None:
        while True:
            asked = [self._queue.get()]
            while not self._queue.empty():
                asked.append(self._queue.get())
            self._write([(record, future) for record, future in asked if record is not None])
            for record, future in asked:
                if record is None and future is not _LAST:
                    self._rotate(future)
            if any(future is _LAST for _, future in asked):
                return

    def _write(self, records: Sequence[tuple[Record, Future]]) -> None:
        """Write some records with one fsync; where that fails, none of them is left in the file."""
        if not records:
            return
        data = b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record, _ in records)
        try:
            _write_all(self._file, data)
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):  # then a cut line stays, and whole ones that will be sent again
                os.ftruncate(self._file, self._size)
            for _, future in records:
                future.set_exception(_refusal(self.folder, error))
            return
        self._size += len(data)
        for _, future in records:
            future.set_result(None)

    def _rotate(self, future: Future) -> None:
        try:
            if self._size:
                os.close(self._file)
                self._open_next()
            future.set_result([path for path in segments(self.folder) if path != self._path])
        except OSError as error:
            future.set_exception(_refusal(self.folder, error))

    def _open_next(self) -> None:
        self._number += 1
        self._path, self._size = self.folder / SEGMENT.format(self._number), 0
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # else a power cut could take the whole file back
        finally:
            os.close(descriptor)


_LAST: Future = Future()


def segments(folder: Path) -> list[Path]:
    """The segments of a log, in their order."""
    return sorted(folder.glob("votes-*.jsonl"), key=_number)


def read_segments(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """All whole records; a last line that was cut off by a kill was never acknowledged and is left out.

    StorageError for a broken line anywhere else: something other than the server wrote there.
    """
    for path in paths:
        lines = path.read_bytes().split(b"\n")[:-1]  # behind the last line break is nothing, or a cut line
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise StorageError(f"{path} is damaged in line {number}: expected a vote as JSON; move the file away "
                                   "to go on without its votes") from None


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("votes-"))


def _locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"another process serves this study, its log {path.parent} is in use: stop that one "
                         "first") from None
    return descriptor


def _writer_name(path: Path) -> str:
    """A random name that stays with this log, for the files that it puts into the store."""
    if not path.exists():
        write_atomically(path, lambda file: file.write(uuid.uuid4().hex[:12].encode()))
    return path.read_text()


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view):]


def _refusal(folder: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot keep votes in {folder}: {first_line(error)}; free space there, or choose another "
                        "folder with --log")
