"""The guarantees every stage relies on, the same for a local folder and for any fsspec URL.

A key is a relative path such as `pools/<id>/shard-00000.json`. What is written appears whole or not at all.
Transient failures (5xx, throttling, timeouts, cut-off reads) are tried again with growing pauses; others (no
permission, no bucket, no such key) fail at once. Every failure is a StorageError of one line.
"""

import contextlib
import functools
import io
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from hgdpo_core.errors import StorageError
from hgdpo_core.storage.failures import MissingKeyError, attempt
from hgdpo_core.storage.keys import TEMPORARY_PREFIX, Entries, checked, is_temporary
from hgdpo_core.storage.local import LocalFiles, open_file, write_atomically
from hgdpo_core.storage.ranges import RangeReader
from hgdpo_core.storage.remote import PARALLEL_CHUNKS, RemoteObjects
from hgdpo_core.storage.roots import PARALLEL_REQUESTS, parse_root

CHUNK_BYTES = 32 * 2**20
"""Remote objects are read in ranges of this size, each tried again by itself: a whole shard would rarely get
through a server that cuts off one read in five."""
PART_BYTES = 32 * 2**20
"""Larger objects go to S3 in parts of this size, each tried again by itself. It takes none under 5 MiB but the last."""
UPLOAD_TRIES = 3

_T = TypeVar("_T")
_Names = list[str]              # inside Store, `list` is a method


def _is(value: Any, kind: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


class Store:
    """Objects under one root. Connects on first use; pickles; usable in threads and after a fork."""

    def __init__(self, root: str):
        """`root`: a path or any fsspec URL. ConfigError for one that holds a secret or makes no sense."""
        self.root, protocol, base = parse_root(os.fspath(root))
        self._objects = LocalFiles(Path(base)) if protocol == "file" else RemoteObjects(protocol, base)
        self._answered = False

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.root,)

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    def url(self, key: str) -> str:
        """The absolute URL of `key`."""
        return f"{self.root.rstrip('/')}/{checked(key)}".rstrip("/")

    def local_path(self, key: str) -> Path | None:
        """The path of `key` on this machine; None when the root is not local."""
        return self._objects.path(key) if isinstance(self._objects, LocalFiles) else None

    # -- objects

    def read_bytes(self, key: str, *, size: int | None = None) -> bytes:
        """The whole object. MissingKeyError when there is none. `size`: where it is known, a request less."""
        if isinstance(self._objects, LocalFiles):
            return self._read(key)
        size = self._existing_size(key) if size is None else size
        if size <= CHUNK_BYTES:
            return self._read_whole(key, size)
        data = bytearray(size)

        def keep(start: int, part: bytes) -> None:
            data[start:start + len(part)] = part

        self._fetch(key, size, keep)
        return bytes(data)

    def write_bytes(self, key: str, data: bytes) -> None:
        """Create or replace an object; a reader sees the old one or the new one, never a part."""
        if len(data) > PART_BYTES and self._is_s3:
            view = memoryview(data)
            self._upload(key, len(data), lambda start, end: bytes(view[start:end]))
        else:
            self._attempt("write", key, self._objects.write, key, data)

    def read_json(self, key: str) -> Any:
        """The parsed object; StorageError when it is not JSON."""
        try:
            return json.loads(self._read(key))
        except ValueError as error:
            raise StorageError(f"{self.url(key)} is not JSON ({error}): delete it, make it again") from None

    def read_object(self, key: str, **fields: Any) -> dict[str, Any]:
        """A JSON object whose fields are of these types, deep ones too; StorageError for any other content."""
        value = self.read_json(key)
        held = value if isinstance(value, dict) else {}
        wrong = [name for name, kind in fields.items() if not _is(held.get(name), kind)]
        if wrong or not isinstance(value, dict):
            which = f" with {' and '.join(wrong)} as it was written" if wrong else ""
            raise StorageError(f"{self.url(key)} is damaged: expected a JSON object{which}; delete it, make it again")
        return value

    def write_json(self, key: str, value: Any) -> None:
        """Sorted keys, indent 1, a newline at the end: readable, and the same text for the same value."""
        text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
        self.write_bytes(key, text.encode())

    def size(self, key: str) -> int | None:
        """Bytes of the object; None when there is no object (a folder is none)."""
        try:
            return self._attempt("look at", key, self._objects.size, key)
        except MissingKeyError:
            return None

    def holds(self, key: str, size: int) -> bool:
        """Whether the object is there with so many bytes: one request, which does not detect a missing bucket."""
        try:
            return self._attempt("look at", key, self._objects.head, key) == size
        except MissingKeyError:
            return False

    def exists(self, key: str) -> bool:
        """Whether there is an object of this key (a folder is none)."""
        return self.size(key) is not None

    def read_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Small objects, many at a time; keys without an object are left out."""
        def read(key: str) -> tuple[str, bytes | None]:
            try:
                return key, self._read(key)
            except MissingKeyError:
                return key, None

        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return {key: data for key, data in pool.map(read, keys) if data is not None}

    def open(self, key: str) -> BinaryIO:
        """A readable, seekable file; only the ranges asked for are transferred, each tried again by itself."""
        path = self.local_path(key)
        if path is not None:
            return self._attempt("read", key, open_file, path)
        size = self._existing_size(key)
        return io.BufferedReader(RangeReader(functools.partial(self._read_range, key), size))

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is already removed."""
        with contextlib.suppress(MissingKeyError):
            self._attempt("delete", key, self._objects.delete, key)

    def move(self, key: str, new_key: str) -> None:
        """Rename an object; remote: copy, then delete. MissingKeyError when there is none."""
        if isinstance(self._objects, LocalFiles):
            self._attempt("move", key, self._objects.rename, key, new_key)
        else:
            self._attempt("move", key, self._objects.copy, key, new_key)
            self.delete(key)

    def check_writable(self) -> None:
        """Write and delete a tiny object: an unusable root fails before any work, with a StorageError."""
        probe = f"{TEMPORARY_PREFIX}probe-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"hgdpo")
        self.delete(probe)

    # -- folders

    def list_folders(self, folder: str = "") -> _Names:
        """Sorted names of the folders directly inside; [] when `folder` does not exist."""
        return sorted(name for name, is_folder, _ in self._entries(folder) if is_folder)

    def list(self, folder: str = "") -> dict[str, int]:
        """Names of the objects directly inside -> bytes, from one LIST; {} when `folder` does not exist."""
        return {name: size for name, is_folder, size in self._entries(folder)
                if not is_folder and not is_temporary(name)}

    def walk(self, folder: str = "") -> Iterator[tuple[str, int, float]]:
        """(key, bytes, last change in seconds since 1970) of every object below, temporary ones too."""
        prefix = f"{folder}/" if folder else ""
        for name, size, changed in self._attempt("list", folder, self._objects.walk, folder):
            yield prefix + name, size, changed

    def put_folder(self, local: Path, key: str) -> None:
        """Copy every file below `local` to the same relative path below `key`."""
        if not local.is_dir():
            raise StorageError(f"expected a folder at {local} to copy to {self.url(key)}, found none")
        for source in sorted(path for path in local.rglob("*") if path.is_file()):
            self._put_file(source, f"{key}/{source.relative_to(local).as_posix()}")

    def get_folder(self, key: str, local: Path, *, leave_out: str | None = None) -> None:
        """Copy the objects below `key` to the same path below `local`, but those whose keys start with `leave_out`.

        MissingKeyError when there is none.
        """
        found = [(name, size) for name, size, _ in self.walk(key)
                 if not is_temporary(name) and not (leave_out and name.startswith(leave_out))]
        if not found:
            raise MissingKeyError(f"{self.url(key)} holds nothing: expected a folder of objects")
        for name, size in found:
            self._download(name, size, local / name[len(key) + 1:])

    # -- unfinished multipart uploads: S3 keeps, hides and bills them until they are aborted

    def unfinished_uploads(self) -> Iterator[tuple[str, str, float]]:
        """(key, upload id, start in seconds since 1970); none where the store has no such thing."""
        if not isinstance(self._objects, RemoteObjects) or not self._is_s3:
            return
        marker = {}
        while marker is not None:
            uploads, marker = self._attempt("list", "", self._objects.list_uploads, marker)
            yield from uploads

    def abort_upload(self, key: str, upload_id: str) -> None:
        """End an unfinished upload and free its parts; one that is gone is already ended."""
        if isinstance(self._objects, RemoteObjects):
            with contextlib.suppress(MissingKeyError):
                self._attempt("delete", key, self._objects.abort_upload, key, upload_id)

    # -- below: requests with their retries

    def _attempt(self, doing: str, key: str, function: Callable[..., _T], *args: Any) -> _T:
        result = attempt(doing, self.url(key), function, *args, answered=self._answered)
        self._answered = True
        return result

    @property
    def _is_s3(self) -> bool:
        return isinstance(self._objects, RemoteObjects) and self._objects.is_s3

    def _put_file(self, source: Path, key: str) -> None:
        if not self._is_s3:
            self._attempt("write", key, self._objects.put_file, source, key)
        elif (size := source.stat().st_size) <= PART_BYTES:
            self.write_bytes(key, source.read_bytes())
        else:
            with source.open("rb") as file:
                self._upload(key, size, lambda start, end: os.pread(file.fileno(), end - start, start))

    def _upload(self, key: str, size: int, read: Callable[[int, int], bytes]) -> None:
        """Send `size` bytes in parts. What fails for good leaves the old object and no unfinished upload."""
        assert isinstance(self._objects, RemoteObjects)
        remote = self._objects
        starts = range(0, size, PART_BYTES)

        def send(upload_id: str, start: int) -> dict[str, Any]:
            data = read(start, min(start + PART_BYTES, size))
            return self._attempt("finish", key, remote.send_part, key, upload_id, start // PART_BYTES + 1, data)

        for _ in range(UPLOAD_TRIES):
            upload_id = self._attempt("write", key, remote.start_upload, key)
            try:
                with ThreadPoolExecutor(PARALLEL_CHUNKS) as pool:
                    parts = list(pool.map(functools.partial(send, upload_id), starts))
                return self._attempt("finish", key, remote.finish_upload, key, upload_id, parts)
            except MissingKeyError:     # a clean-up took it, or it was finished and the answer got lost: once more
                continue
            except BaseException:
                with contextlib.suppress(StorageError):     # what is left, `hgdpo gc` ends after a day
                    self.abort_upload(key, upload_id)
                raise
        raise StorageError(f"cannot write {self.url(key)}: {UPLOAD_TRIES} uploads were gone before they were finished; "
                           "find out what ends them on the server")

    def _read(self, key: str) -> bytes:
        return self._attempt("read", key, self._objects.read, key)

    def _existing_size(self, key: str) -> int:
        size = self.size(key)
        if size is None:
            raise MissingKeyError(f"{self.url(key)} does not exist")
        return size

    def _entries(self, folder: str) -> Entries:
        try:
            return self._attempt("list", folder, self._objects.entries, folder)
        except MissingKeyError:
            return []

    def _read_range(self, key: str, start: int, end: int) -> bytes:
        def read() -> bytes:
            data = self._objects.read_range(key, start, end)
            if len(data) != end - start:
                raise ConnectionError(f"expected {end - start} bytes from byte {start}, got {len(data)}")
            return data

        return self._attempt("read", key, read)

    def _read_whole(self, key: str, size: int) -> bytes:
        def read() -> bytes:
            data = self._objects.read(key)
            if len(data) != size and len(data) != self._objects.size(key):      # it may have been replaced
                raise ConnectionError(f"expected {size} bytes, got {len(data)}")
            return data

        return self._attempt("read", key, read)

    def _fetch(self, key: str, size: int, keep: Callable[[int, bytes], object]) -> None:
        def fetch(start: int) -> None:
            keep(start, self._read_range(key, start, min(start + CHUNK_BYTES, size)))

        with ThreadPoolExecutor(PARALLEL_CHUNKS) as pool:
            for _ in pool.map(fetch, range(0, size, CHUNK_BYTES)):
                pass

    def _download(self, key: str, size: int, target: Path) -> None:
        def fill(file: BinaryIO) -> None:
            if size <= CHUNK_BYTES:
                file.write(self._read_whole(key, size))
            else:
                self._fetch(key, size, lambda start, data: os.pwrite(file.fileno(), data, start))

        self._attempt("read", key, write_atomically, target, fill)
