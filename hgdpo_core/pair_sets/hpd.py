"""HPD v2 (`ymhao/HPDv2`): one JSON list of pairs, and one compressed tar with the images of all of them.

A gzip stream has no random access. So one pass copies the images that are needed into one file of this user's cache,
from which shards read them in any order; a pass that is stopped starts again.
"""

import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import InputError, StorageError
from hgdpo_core.image_sets.folders import FolderReader
from hgdpo_core.image_sets.tars import SEQUENCE_BYTES, TarReader, unbuffered
from hgdpo_core.pair_sets.files import PairFile
from hgdpo_core.pair_sets.indexed import IndexedPairs, index_row
from hgdpo_core.pair_sets.rows import PairText
from hgdpo_core.storage import Store
from hgdpo_core.storage.scratch import cache_folder
from hgdpo_core.storage.shards import read_table, write_table
from hgdpo_core.storage.text_files import decode_text

logger = logging.getLogger(__name__)
TARS = (".tar.gz", ".tgz", ".tar")
IMAGES, PLACES = "images.bin", "places.parquet"
LABELS = {(1, 0): (1.0, 0.0), (0, 1): (0.0, 1.0)}
MARGIN_BYTES = 2**28
CHECK_EVERY = 1000  # members


def index_hpd(store: Store, key: str) -> Iterator[dict[str, Any]]:
    """A row of `indexed.INDEX` for every entry {prompt, file_path: [a, b], human_preference: [1, 0]} of the list.

    `image_path` is taken for `file_path`. InputError for another kind of JSON.
    """
    url = store.url(key).removeprefix("file://")
    for number, entry in enumerate(_entries(decode_text(store.read_bytes(key), url), url)):
        if not isinstance(entry, dict) or "prompt" not in entry or not {"file_path", "image_path"} & entry.keys():
            got = ", ".join(entry) if isinstance(entry, dict) else f"{entry!r:.80}"
            raise InputError(f'pairs: entry {number} of {url} is not {{"prompt": …, "file_path": [a, b], '
                             f'"human_preference": [1, 0]}}: got {got}')
        yield _entry(f"{key}#{number}", entry)


def _entries(text: str, url: str) -> Iterator[Any]:
    """The items of a JSON list one by one: as objects, the whole list would take several times its text."""
    decoder, end = json.JSONDecoder(), len(text)
    at = _skip(text, 0, end)
    if at == end or text[at] != "[":
        raise InputError(f"pairs: {url} is not a JSON list of pairs")
    at = _skip(text, at + 1, end)
    while at < end and text[at] != "]":
        try:
            item, at = decoder.raw_decode(text, at)
        except ValueError as error:
            raise InputError(f"pairs: {url} is not JSON: {error}; get it again") from None
        yield item
        at = _skip(text, at, end)
        if at < end and text[at] == ",":
            at = _skip(text, at + 1, end)
    if at == end:
        raise InputError(f"pairs: {url} is cut off: its list does not end; get it again")


def _skip(text: str, at: int, end: int) -> int:
    while at < end and text[at].isspace():
        at += 1
    return at


def _entry(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    prompt, files = entry["prompt"], entry.get("file_path", entry.get("image_path"))
    if not isinstance(prompt, str | None):
        return index_row(PairText(name, None, None, problem=f"prompt is not text: {prompt!r:.80}"))
    if not isinstance(files, list) or len(files) != 2 or not all(isinstance(file, str) for file in files):
        return index_row(PairText(name, None, None, problem=f"it does not name two images: {files!r:.80}"))
    preference = entry.get("human_preference")
    known = isinstance(preference, list) and all(isinstance(value, int | float) for value in preference)
    labels = LABELS.get(tuple(preference)) if known and preference is not None else None
    # another preference names no winner; one that is absent is no label
    label_0, label_1 = labels or ((None, None) if preference is None else (-1.0, -1.0))
    names = [PurePosixPath(file).name for file in files]
    text = PairText(name, prompt, label_0, label_1, are_different=names[0] != names[1], uids=(names[0], names[1]))
    return index_row(text, image_0=names[0], image_1=names[1])


# -- images


def open_hpd(store: Store, index: pa.Table, files: Sequence[PairFile], identity: str, used: Collection[str],
             check_stop: Callable[[], object]) -> IndexedPairs:
    """The pairs of an index with the images `used` (base names), from a tar by one pass, or from a folder of images."""
    packed = [file for file in files if file.key.lower().endswith(TARS)]
    if packed:
        scratch = unpack(store, packed, identity, used, check_stop)
        return IndexedPairs(_with_places(index, read_table(scratch, PLACES)), TarReader(scratch, [IMAGES]))
    keys = {PurePosixPath(file.key).name: file.key for file in files}
    for side in (0, 1):
        names = [keys.get(name) for name in index[f"image_{side}"].to_pylist()]
        index = index.set_column(index.schema.get_field_index(f"image_{side}"), f"image_{side}",
                                 pa.array(names, pa.string()))
    return IndexedPairs(index, FolderReader(store))


def unpack(store: Store, tars: Sequence[PairFile], identity: str, used: Collection[str],
           check_stop: Callable[[], object]) -> Store:
    """A folder of the cache with the images `used` of the tars in one file, and their places in it.

    Tars are matched by base names: their folders are not named in the list. A name that several members have is left
    out, since which one was meant is not known. StorageError, before any byte is read, for a disk without the room.
    """
    folder = cache_folder("pairs") / content_hash([identity, *sorted(used)], 24)
    scratch = Store(str(folder))
    if scratch.exists(PLACES):
        return scratch
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_small_disk(folder, sum(file.bytes for file in tars))
    partial = folder / f"{IMAGES}.{os.getpid()}"
    places: dict[str, tuple[int, int] | None] = {}
    with partial.open("wb") as file:
        for tar in tars:
            _copy(store, tar, set(used), places, file, check_stop)
    partial.replace(folder / IMAGES)
    found = {name: place for name, place in places.items() if place is not None}
    write_table(scratch, PLACES, pa.table({"name": list(found), "start": [start for start, _ in found.values()],
                                           "bytes": [size for _, size in found.values()]}))
    return scratch


def _refuse_small_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + MARGIN_BYTES:
        raise StorageError(f"pairs: up to {size / 1e9:,.1f} GB of images are unpacked into {folder}, whose disk has "
                           f"{free / 1e9:,.1f} GB left: free some space, or set XDG_CACHE_HOME to a folder on a larger "
                           "disk")
    logger.warning("pairs: one pass over %.1f GB, as one stream, into %s; a pass that is stopped starts again",
                   size / 1e9, folder)


def _copy(store: Store, tar: PairFile, used: Collection[str], places: dict[str, tuple[int, int] | None], target: Any,
          check_stop: Callable[[], object]) -> None:
    """Append the members that are `used`; `places` gets the start and size of each."""
    url = store.url(tar.key).removeprefix("file://")
    try:
        with _Buffered(store, tar.key) as stream, tarfile.open(fileobj=stream, mode="r|*") as members:
            for number, member in enumerate(members):
                setattr(members, "members", [])  # noqa: B010 - tarfile would keep every member
                if number % CHECK_EVERY == 0:
                    check_stop()
                name = PurePosixPath(member.name).name
                if not member.isfile() or name not in used:
                    continue
                if name in places:
                    places[name] = None
                    continue
                start, content = target.tell(), members.extractfile(member)
                assert content is not None  # a regular file
                shutil.copyfileobj(content, target)
                places[name] = start, member.size
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, StorageError):
            raise
        raise InputError(f"pairs: {url} is cut off or not a tar file: {error}; get it again") from None


class _Buffered:
    """A file of the store, read in long sequences."""

    def __init__(self, store: Store, key: str):
        self._file = io.BufferedReader(unbuffered(store.open(key)), SEQUENCE_BYTES)

    def __enter__(self) -> Any:
        return self._file

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _with_places(index: pa.Table, places: pa.Table) -> pa.Table:
    """The index with the place of each image; an image without one has no name."""
    names = places["name"].combine_chunks()
    compute: Any = pc  # its functions are made on import, where no checker of types sees them
    columns = {name: index[name] for name in index.schema.names}
    for side in (0, 1):
        at = compute.index_in(index[f"image_{side}"].combine_chunks(), value_set=names)
        for column in ("start", "bytes"):
            columns[f"{column}_{side}"] = places[column].combine_chunks().take(at)
        known = at.is_valid()
        columns[f"image_{side}"] = compute.if_else(known, index[f"image_{side}"].combine_chunks(), None)
    columns["file"] = pa.array([0] * index.num_rows, pa.int32())
    return pa.table(columns, schema=index.schema)
