"""Webdataset shards: tars whose members of one name up to its first dot are a sample, an image with its text in .txt
or .json. Where several images share that name, each goes with the text of its whole name ("look 1.5", "look 1.7").

Read with `tarfile` and not through a streaming library: an index of the position of each image is made once, so that a
run which stops continues at any image, and only the bytes asked for are transferred.
"""

import contextlib
import io
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa

from hgdpo_core.errors import InputError
from hgdpo_core.image_sets.folders import caption_of
from hgdpo_core.images import IMAGE_SUFFIXES
from hgdpo_core.storage import Store
from hgdpo_core.storage.text_files import decode_text, parse_json

HEADER_BYTES = 2**16    # one request at a remote store: a header, the small texts and the next header
SEQUENCE_BYTES = 2**23
PARALLEL_TARS = 8
MAX_TEXT_BYTES = 2**20
TEXTS = (".txt", ".json")


def index_tars(store: Store, files: Sequence[str], skipped: Counter[str]) -> Iterator[dict[str, Any]]:
    """A row of `sets.INDEX` for every sample with an image, what else is in them counted in `skipped` by its kind.

    InputError for a tar that is cut off or none.
    """
    with ThreadPoolExecutor(PARALLEL_TARS) as pool:
        for number, (samples, others) in enumerate(pool.map(lambda key: _samples(store, key), files)):
            skipped.update(others)
            yield from ({**sample, "file": number} for sample in samples)


def _samples(store: Store, key: str) -> tuple[list[dict[str, Any]], Counter[str]]:
    """In the order of their images; an image and its text need not be neighbours, as they are in webdataset's own."""
    images: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, str]] = {}  # by the text's whole name, then by suffix
    skipped: Counter[str] = Counter()
    url = store.url(key).removeprefix("file://")
    with open_tar(store, key) as (tar, members):
        for member in members:
            name = PurePosixPath(member.name)
            stem, suffix = str(name.with_suffix("")) if name.name else "", name.suffix.lower()
            if not member.isfile() or name.name.startswith("."):
                skipped["hidden or special members of tars"] += not member.isdir()
            elif suffix in IMAGE_SUFFIXES:
                images[str(name)] = {"name": f"{key}/{name}", "start": member.offset_data, "bytes": member.size}
            elif suffix in TEXTS and member.size <= MAX_TEXT_BYTES:
                with contextlib.suppress(InputError):  # as if it were missing: the image counts as one without
                    texts.setdefault(stem, {})[suffix] = decode_text(member_bytes(tar, member), f"{name} in {url}")
            else:
                skipped[f"members of tars of the kind {suffix or 'without a suffix'}"] += 1
    chosen = _pair(images, texts)
    skipped["images of tars beside another of their sample"] += len(images) - len(chosen)
    return [{**images[name], "caption": caption} for name, caption in chosen.items()], +skipped


@contextlib.contextmanager
def open_tar(store: Store, key: str,
             what: str = "images") -> Iterator[tuple[tarfile.TarFile, Iterator[tarfile.TarInfo]]]:
    """A tar of the user's `what` and its members, of which none is kept; InputError for one that is cut off or none."""
    try:
        with (io.BufferedReader(unbuffered(store.open(key)), HEADER_BYTES) as file,
              tarfile.open(fileobj=file, mode="r:") as tar):
            yield tar, _members(tar)
    except tarfile.TarError as error:
        raise InputError(f"{what}: {store.url(key).removeprefix('file://')} is cut off or not a tar file: {error}; get "
                         "it again (a compressed one has to be unpacked to .tar)") from None


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        setattr(tar, "members", [])  # noqa: B010 - tarfile would keep every member; its stub hides the list
        yield member


def _pair(images: Mapping[str, Any], texts: Mapping[str, dict[str, str]]) -> dict[str, str | None]:
    """The image of each sample, all that have a text of their whole name, with its caption."""
    samples, fields = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for name in images:
        samples[_sample(name)].append(name)
    for stem in texts:
        fields[_sample(stem)].append(stem)
    chosen: dict[str, str | None] = {}
    for sample, names in samples.items():
        own = {name: caption for name in names if (caption := _caption(texts.get(_stem(name), {})))}
        if not own:
            first = names[0]
            # a sample's text may be 0001.caption.txt; one of look 1.7 is not that of look 1.5
            stems = [sample] if _stem(first) != sample else fields[sample]
            own = {first: next((caption for stem in stems if (caption := _caption(texts.get(stem, {})))), None)}
        chosen |= own
    return {name: chosen[name] for name in images if name in chosen}


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _sample(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.parent / path.name.partition(".")[0])


def unbuffered(file: BinaryIO) -> Any:
    """A file without the buffer of its own, which would cut reads into small ones."""
    return file.detach() if isinstance(file, io.BufferedReader) else file


def member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The content of a regular file in a tar."""
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
        """Close the open tar."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _file(self, number: int) -> BinaryIO:
        if self._open is None or self._open[0] != number:
            self.close()
            file = io.BufferedReader(unbuffered(self._store.open(self._files[number])), SEQUENCE_BYTES)
            self._open = number, file
        return self._open[1]
