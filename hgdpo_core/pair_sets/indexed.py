"""Pairs whose texts are read up front into an index: JSON Lines, webdataset tars, HPD v2.

Memory holds some hundred bytes for each pair; images stay where they are.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Protocol

import pyarrow as pa

from hgdpo_core.errors import ConfigError, InputError
from hgdpo_core.image_sets.folders import batched
from hgdpo_core.image_sets.tars import MAX_TEXT_BYTES, member_bytes, open_tar
from hgdpo_core.pair_sets.rows import PairText, read_pick_a_pic
from hgdpo_core.pair_sets.tables import Images
from hgdpo_core.storage import Store
from hgdpo_core.storage.keys import checked
from hgdpo_core.storage.text_files import decode_text, json_lines, parse_json

INDEX = pa.schema([
    ("name", pa.string()), ("prompt", pa.string()), ("label_0", pa.float64()), ("label_1", pa.float64()),
    ("has_label", pa.bool_()), ("are_different", pa.bool_()), ("uid_0", pa.string()), ("uid_1", pa.string()),
    ("model_0", pa.string()), ("model_1", pa.string()), ("problem", pa.string()),
    ("image_0", pa.string()), ("image_1", pa.string()), ("file", pa.int32()),
    ("start_0", pa.int64()), ("bytes_0", pa.int64()), ("start_1", pa.int64()), ("bytes_1", pa.int64())])
"""`image_*`: a key, of HPD v2 a base name; `file`, `start_*` and `bytes_*`: where an image is in a tar."""
ABSENT = "it is not in the data set"


class ImageReader(Protocol):
    """The readers of hgdpo_core/image_sets/."""

    def read(self, rows: pa.Table) -> Iterator[bytes | str]:
        """Of each row the bytes, or why there are none."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


class IndexedPairs:
    """Reads rows of an index, their images by a reader of image sets."""

    def __init__(self, index: pa.Table, reader: ImageReader):
        self._index, self._reader = index, reader

    def texts(self, rows: Sequence[int]) -> list[PairText]:
        """The rows without their images."""
        return [text_of(row) for row in self._index.take(pa.array(rows, pa.int64())).to_pylist()]

    def images(self, rows: Sequence[int]) -> Iterator[Images]:
        """The two images of each row."""
        found = self._index.take(pa.array(rows, pa.int64())).to_pylist()
        sides = [{"name": row[f"image_{side}"], "file": row["file"], "start": row[f"start_{side}"],
                  "bytes": row[f"bytes_{side}"]} for row in found for side in (0, 1)]
        there = [side for side in sides if side["name"] is not None]
        contents = self._reader.read(pa.Table.from_pylist(there, schema=LOCATIONS))
        images = (ABSENT if side["name"] is None else next(contents) for side in sides)
        yield from zip(images, images, strict=True)

    def close(self) -> None:
        """Close what the reader holds open."""
        self._reader.close()


LOCATIONS = pa.schema([("name", pa.string()), ("file", pa.int32()), ("start", pa.int64()), ("bytes", pa.int64())])


def text_of(row: Mapping[str, Any]) -> PairText:
    """A row of INDEX."""
    return PairText(row["name"], row["prompt"], row["label_0"], row["label_1"], row["has_label"], row["are_different"],
                    (row["uid_0"], row["uid_1"]), (row["model_0"], row["model_1"]), row["problem"] or "")


def index_row(text: PairText, **location: Any) -> dict[str, Any]:
    """A row of INDEX from its texts and where its images are."""
    return {"name": text.name, "prompt": text.prompt, "label_0": text.label_0, "label_1": text.label_1,
            "has_label": text.has_label, "are_different": text.are_different, "uid_0": text.uids[0],
            "uid_1": text.uids[1], "model_0": text.models[0], "model_1": text.models[1], "problem": text.problem,
            **location}


def to_index(rows: Iterator[dict[str, Any]]) -> pa.Table:
    """Rows as a table; never all of them are Python objects."""
    batches = [pa.RecordBatch.from_pylist(part, schema=INDEX) for part in batched(rows, 10_000)]
    return pa.Table.from_batches(batches, schema=INDEX).combine_chunks()


# -- JSON Lines


def index_json_lines(store: Store, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row of INDEX for every line {"prompt": …, "winner": …, "loser": …}, images relative to the line's file."""
    for key in keys:
        url = store.url(key).removeprefix("file://")
        for number, row in json_lines(decode_text(store.read_bytes(key), url), url):
            if not isinstance(row, dict) or not {"prompt", "winner", "loser"} <= row.keys():
                got = ", ".join(row) if isinstance(row, dict) else f"{row!r:.80}"
                raise InputError(f'pairs: line {number} of {url} is not {{"prompt": …, "winner": …, "loser": …}}: '
                                 f"got {got}")
            yield _line(key, f"{key}#{number}", row)


def _line(key: str, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    values = [row[column] for column in ("prompt", "winner", "loser")]
    if wrong := [value for value in values if not isinstance(value, str | None)]:
        return index_row(PairText(name, None, None, problem=f"not text: {wrong[0]!r:.80}"))
    folder = key.rpartition("/")[0]
    try:
        images = [None if file is None else checked(str(PurePosixPath(folder) / file)) for file in values[1:]]
    except ConfigError:
        return index_row(PairText(name, None, None, problem=f"an image is outside of its folder: {values[1:]!r:.200}"))
    text = PairText(name, values[0], 1.0, 0.0, uids=(f"{name}-{values[1]}", f"{name}-{values[2]}"))
    return index_row(text, image_0=images[0], image_1=images[1])


# -- webdataset tars


def index_tars(store: Store, keys: Sequence[str], skipped: Counter[str]) -> Iterator[dict[str, Any]]:
    """A row of INDEX for every sample of tars: 0001.jpg_0, 0001.jpg_1 and 0001.json with Pick-a-Pic's other columns.

    What else is in them is counted in `skipped`, by its kind.
    """
    for number, key in enumerate(keys):
        found = False
        for name, sample in _samples(store, key, skipped).items():
            found = True
            text = (read_pick_a_pic(sample["row"], f"{key}/{name}") if "row" in sample else
                    PairText(f"{key}/{name}", None, None, problem=sample.get("problem", "it has no .json")))
            yield index_row(text, file=number, **{place: value for side in (0, 1) if f"jpg_{side}" in sample
                                                  for place, value in _location(sample, side).items()})
        if not found:
            raise InputError(f"pairs: {store.url(key).removeprefix('file://')} holds no pair: expected samples of "
                             "0001.jpg_0, 0001.jpg_1 and 0001.json with caption and label_0")


def _location(sample: Mapping[str, Any], side: int) -> dict[str, Any]:
    start, size = sample[f"jpg_{side}"]
    return {f"image_{side}": f"jpg_{side}", f"start_{side}": start, f"bytes_{side}": size}


def _samples(store: Store, key: str, skipped: Counter[str]) -> dict[str, dict[str, Any]]:
    """Name of each sample -> where its images are, and the row of its .json."""
    samples: dict[str, dict[str, Any]] = {}
    with open_tar(store, key, "pairs") as (tar, members):
        for member in members:
            path = PurePosixPath(member.name)
            stem, _, kind = path.name.partition(".")
            kind = kind.lower()
            sample, side = str(path.parent / stem), kind.partition(".")[0]
            if not member.isfile() or not stem:
                skipped["hidden or special members of tars"] += not member.isdir()
            elif side in ("jpg_0", "jpg_1"):
                samples.setdefault(sample, {})[side] = member.offset_data, member.size
            elif kind == "json":
                _add_row(samples.setdefault(sample, {}), member_bytes(tar, member)
                         if member.size <= MAX_TEXT_BYTES else b"")
            else:
                skipped[f"members of tars of the kind {kind or 'without a suffix'}"] += 1
    return samples


def _add_row(sample: dict[str, Any], data: bytes) -> None:
    try:
        row = parse_json(decode_text(data, "its .json"))
    except ValueError as error:  # InputError is one
        sample["problem"] = f"its .json cannot be read: {error}"
        return
    if isinstance(row, dict):
        sample["row"] = row
    else:
        sample["problem"] = "its .json is not an object"
