"""Webdataset shards: tars whose members of one stem are a sample, an image with its text in .txt or .json.

Read with `tarfile` and not through a streaming library: an index of where each image lies is made once, so that a run
which stops goes on at any image, and only the bytes asked for travel.
"""

import io
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa

from hgdpo_core.errors import InputError
from hgdpo_core.image_sets.folders import caption_of
from hgdpo_core.images import IMAGE_SUFFIXES
from hgdpo_core.storage import Store
from hgdpo_core.text_files import decode_text, parse_json

HEADER_BYTES = 2**16    # one request at a remote store: a header, the small texts and the next header
SEQUENCE_BYTES = 2**23
PARALLEL_TARS = 8
MAX_TEXT_BYTES = 2**20
TEXTS = (".txt", ".json")


def index_tars(store: Store, files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row of `sets.INDEX` for every sample with an image; InputError for a tar that is cut off or none."""
    with ThreadPoolExecutor(PARALLEL_TARS) as pool:
        for number, samples in enumerate(pool.map(lambda key: list(_samples(store, key)), files)):
            yield from ({**sample, "file": number} for sample in samples)


def _samples(store: Store, key: str) -> Iterator[dict[str, Any]]:
    """In the order of their images; an image and its text need not be neighbours, as they are in webdataset's own."""
    images: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, str]] = {}
    url = store.url(key).removeprefix("file://")
    try:
        with (io.BufferedReader(_raw(store.open(key)), HEADER_BYTES) as file,
              tarfile.open(fileobj=file, mode="r:") as tar):
            for member in tar:
                setattr(tar, "members", [])  # noqa: B010 - tarfile would keep every member; its stub hides the list
                name = PurePosixPath(member.name)
                if not member.isfile() or name.name.startswith("."):
                    continue
                stem, suffix = str(name.parent / name.name.partition(".")[0]), name.suffix.lower()
                if suffix in IMAGE_SUFFIXES:
                    images.setdefault(stem, {"name": f"{key}/{name}", "start": member.offset_data,
                                             "bytes": member.size})
                elif suffix in TEXTS and member.size <= MAX_TEXT_BYTES:
                    text = decode_text(_content(tar, member), f"{name} in {url}")
                    texts.setdefault(stem, {})[suffix] = text
    except tarfile.TarError as error:
        raise InputError(f"images: {url} is cut off or no tar: {error}; get it again (a compressed one has to be "
                         "unpacked to .tar)") from None
    yield from ({**image, "caption": _caption(texts.get(stem, {}))} for stem, image in images.items())


def _raw(file: BinaryIO) -> Any:
    """Without the buffer of its own, which would cut reads into small ones."""
    return file.detach() if isinstance(file, io.BufferedReader) else file


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member)
    assert content is not None  # a regular file
    return content.read()


def _caption(texts: dict[str, str]) -> str | None:
    """Of the .txt, else of the .json; None where neither holds one."""
    if texts.get(".txt", "").strip():
        return texts[".txt"].strip()
    try:
        row = parse_json(texts.get(".json", "null"))
    except ValueError:
        return None
    caption = caption_of(row) if isinstance(row, dict) else None
    return caption if isinstance(caption, str) else None


class TarReader:
    """The bytes of images inside tars; one tar is open at a time."""

    def __init__(self, store: Store, files: Sequence[str]):
        self._store, self._files = store, files
        self._open: tuple[int, BinaryIO] | None = None

    def read(self, rows: pa.Table) -> Iterator[bytes | str]:
        """Of each row the bytes, or why there are none."""
        for row in rows.to_pylist():
            file = self._file(row["file"])
            file.seek(row["start"])
            data = file.read(row["bytes"])
            yield data if len(data) == row["bytes"] else "its tar ends before it does"

    def close(self) -> None:
        """Let go of the open tar."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _file(self, number: int) -> BinaryIO:
        if self._open is None or self._open[0] != number:
            self.close()
            file = io.BufferedReader(_raw(self._store.open(self._files[number])), SEQUENCE_BYTES)
            self._open = number, file
        return self._open[1]
