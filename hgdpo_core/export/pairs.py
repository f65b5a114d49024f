"""Triplets as folders of image files and captions, in the layout that another trainer reads.

Shard after shard, so that no data set is too large; image files hold the stored bytes, untouched. `pairs.json` in the
folder records what became of each shard: a second start keeps what is there and continues.
"""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from hgdpo_core.errors import ConfigError, InputError
from hgdpo_core.export.layouts import LAYOUTS, Layout, Size
from hgdpo_core.images import open_image
from hgdpo_core.parallel import thread_map
from hgdpo_core.progress import Progress, count_of, silent
from hgdpo_core.stages.dataset_card import card_licence
from hgdpo_core.stages.triplets import SCHEMA
from hgdpo_core.storage import Store, is_temporary
from hgdpo_core.storage.shards import ShardFolder, ShardManifest

COLUMNS = pa.schema([SCHEMA.field(name) for name in ("jpg_0", "jpg_1", "label_0", "caption")])
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}  # read by all of these trainers
RECORD_NAME, README_NAME, CARD_NAME = "pairs.json", "README.md", "dataset_card.md"

NOT_WINNER = "the first image is not labelled the winner"
NO_CAPTION = "the caption is empty"
UNREADABLE = "an image is not readable as PNG, JPEG or WebP"
OTHER_KIND = "winner and loser are files of different kinds"
OTHER_SIZE = "winner and loser differ in size"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ShardRecord(_Model):
    """What became of one shard's pairs."""

    file: str
    """The shard's data file, named by its hash."""
    read: int
    """Pairs from its first one; fewer than it has where a limit ended the export."""
    refused: dict[int, str] = {}
    """Row -> reason."""
    joined: int = 0
    """Captions of several lines that were made one."""
    sizes: set[Size] = set()

    @property
    def written(self) -> int:
        return self.read - len(self.refused)

    def names(self, index: int) -> list[str]:
        """The written pairs' names."""
        return [_name(index, row) for row in range(self.read) if row not in self.refused]


class Record(_Model):
    """`pairs.json`: the layout and data set of a folder, and its shards by index."""

    version: Literal[1] = 1
    layout: str
    triplets: str
    shards: dict[int, ShardRecord] = {}

    @property
    def written(self) -> int:
        return sum(shard.written for shard in self.shards.values())

    @property
    def refused(self) -> Counter[str]:
        """Reason -> pairs."""
        return Counter(reason for shard in self.shards.values() for reason in shard.refused.values())


@dataclass(frozen=True)
class ExportedPairs:
    """The pairs of a folder, those of earlier starts included; `read` is `written` and the `refused` together."""

    layout: str
    triplets: str
    read: int
    written: int
    existing: int
    """Of the written: those that were there before."""
    refused: dict[str, int]
    """Reason -> pairs."""
    joined: int
    """Of the written: captions of several lines, which these trainers read as several captions, made one line."""
    config: Path
    """The file that the trainer is given."""


@dataclass
class _Export:
    """An export under way."""

    layout: Layout
    output: Store
    present: set[str]
    """Keys that were in the folder at the start."""
    record: Record
    limit: int | None
    existing: int = 0

    def left(self) -> int | None:
        """Pairs that may still be written; None for any number."""
        return None if self.limit is None else self.limit - self.record.written

    def keys(self, name: str, suffix: str) -> list[str]:
        """A pair's files: winner, loser and their captions."""
        folders = self.layout.winners, self.layout.losers
        return [f"{folder}/{name}{ending}" for ending in (suffix, self.layout.caption_suffix) for folder in folders]


def export_pairs(store: Store, folder: Path, layout: str, *, triplets: str | None = None, limit: int | None = None,
                 progress: Progress = silent) -> ExportedPairs:
    """Write a data set's pairs into a local folder as the trainer of `layout`, a key of LAYOUTS, reads them.

    `triplets`: key or id, may be left out where the root holds one finished data set. `limit`: at most so many pairs.
    The data set's card goes along as dataset_card.md, its licence also into README.md. Pairs that these trainers cannot
    read are refused and counted by reason. ConfigError for an unknown layout, InputError for a data set that is
    missing, unfinished or without a usable pair, or a folder with anything else in it; StorageError for a full disk.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"there is no layout {layout!r}: choose {', '.join(LAYOUTS)}")
    key = find_triplets(store, triplets)
    card, data = store.read_bytes(f"{key}/README.md"), ShardFolder.open(store, key)
    export, manifests = _open_export(folder, layout, key, limit), data.manifests()
    rows = sum(manifest.rows for manifest in manifests.values())
    for index, manifest in manifests.items():
        if export.left() != 0 or index in export.record.shards:
            _take_shard(export, data, index, manifest)
        refused = export.record.refused.total()
        progress(export.record.written, min(rows - refused, limit or rows), "pairs")
    return _finish(export, key, card, card_licence(store, key))


def find_triplets(store: Store, name: str | None) -> str:
    """The key of a finished data set of triplets, by its key or id, or of the root's only one."""
    finished = [f"triplets/{found}" for found in sorted(store.list_folders("triplets"))
                if store.exists(f"triplets/{found}/README.md")]
    there = f"it has {', '.join(finished) or 'none yet'}; a data set is finished once it has a README.md"
    if name is None and len(finished) != 1:
        raise InputError(f"{store.root} holds {count_of(len(finished), 'finished data set')} of triplets, expected one "
                         f"where none is named: {there}")
    key = finished[0] if name is None else f"triplets/{name.strip('/').removeprefix('triplets/')}"
    if key not in finished:
        raise InputError(f"{name} is not a finished data set of triplets in {store.root}: {there}")
    return key


# -- the folder


def _open_export(folder: Path, layout: str, key: str, limit: int | None) -> _Export:
    """The export into an empty folder, or into one that an earlier start of the same export left."""
    output = Store(str(folder.resolve()))
    present = {name for name, _, _ in output.walk() if not is_temporary(name)}
    new = Record(layout=layout, triplets=key)
    record = _read_record(output, folder) if RECORD_NAME in present else new
    if present and RECORD_NAME not in present:
        raise InputError(f"{folder} is not empty and has no {RECORD_NAME} of an earlier export: choose an empty or new "
                         "folder")
    if (record.layout, record.triplets) != (layout, key):
        raise InputError(f"{folder} holds pairs of {record.triplets} for {record.layout}, expected {key} for {layout}: "
                         "choose another folder")
    if limit is not None and record.written > limit:
        raise InputError(f"{folder} holds {count_of(record.written, 'pair')} already, the limit is {limit:,}: raise "
                         "it, or choose another folder")
    if not present:
        _keep(output, record)  # first of all: a folder that a stop leaves is known again
    return _Export(LAYOUTS[layout], output, present, record, limit)


def _read_record(output: Store, folder: Path) -> Record:
    try:
        return Record.model_validate(output.read_json(RECORD_NAME))
    except ValidationError:
        raise InputError(f"{folder / RECORD_NAME} is not what an export of this version writes: choose another "
                         "folder") from None


def _keep(output: Store, record: Record) -> None:
    output.write_json(RECORD_NAME, record.model_dump(mode="json"))


# -- one shard


def _take_shard(export: _Export, data: ShardFolder, index: int, manifest: ShardManifest) -> None:
    """Write what is missing of one shard's pairs, up to the limit, and record them."""
    done = export.record.shards.get(index)
    if done is not None and done.file != manifest.file:
        raise InputError(f"shard {index} of {data.store.url(data.key)} was made again since the export into "
                         f"{export.output.root} began: choose an empty folder")
    if done is not None and done.read == manifest.rows and _has_all(export, index, done):
        export.existing += done.written
        return
    export.record.shards.pop(index, None)
    rows = data.read(index, COLUMNS.names, manifest=manifest, schema=COLUMNS).to_pylist()
    record, pairs = _select(rows, index, export.left())
    record.file = manifest.file
    export.existing += sum(thread_map(lambda pair: _write_pair(export, *pair), pairs))
    export.record.shards[index] = record
    _keep(export.output, export.record)


def _has_all(export: _Export, index: int, done: ShardRecord) -> bool:
    """Whether the files of a recorded shard's pairs are all there."""
    return all(any(export.present.issuperset(export.keys(name, suffix)) for suffix in SUFFIXES.values())
               for name in done.names(index))


def _select(rows: Sequence[dict[str, Any]], index: int,
            limit: int | None) -> tuple[ShardRecord, list[tuple[str, str, dict[str, Any]]]]:
    """What becomes of a shard's pairs, and (name, suffix of the images, row) of those to write, at most `limit`."""
    record, pairs = ShardRecord(file="", read=0), []
    for number, row in enumerate(rows):
        if limit is not None and len(pairs) == limit:
            break
        record.read += 1
        found = _examine(row)
        if isinstance(found, str):
            record.refused[number] = found
            continue
        suffix, size = found
        record.sizes.add(size)
        record.joined += _one_line(row["caption"]) != row["caption"].strip()
        pairs.append((_name(index, number), suffix, row))
    return record, pairs


def _examine(row: dict[str, Any]) -> tuple[str, Size] | str:
    """Suffix and size of both images, or why the pair is refused; of the images, only headers are read."""
    if row["label_0"] != 1:
        return NOT_WINNER
    if not _one_line(row["caption"] or ""):
        return NO_CAPTION
    try:
        images = [open_image(io.BytesIO(row[name])) for name in ("jpg_0", "jpg_1")]
    except Exception:  # Pillow's decoders raise a wide family
        return UNREADABLE
    kinds, sizes = {image.format for image in images}, {image.size for image in images}
    if not kinds <= SUFFIXES.keys():
        return UNREADABLE
    if len(kinds) > 1:
        return OTHER_KIND  # SimpleTuner finds a loser by its winner's whole name
    if len(sizes) > 1:
        return OTHER_SIZE  # sd-scripts stops at a pair whose images fall into different buckets
    return SUFFIXES[str(kinds.pop())], sizes.pop()


def _one_line(caption: str) -> str:
    """The caption as one line: these trainers read each line as a caption of its own, or the first line alone."""
    return " ".join(filter(None, map(str.strip, caption.splitlines())))


def _name(index: int, row: int) -> str:
    """A name of digits, safe everywhere, from the places of shard and row; the order of names is that of the rows."""
    return f"{index:05d}-{row:05d}"


def _write_pair(export: _Export, name: str, suffix: str, row: dict[str, Any]) -> bool:
    """Write a pair's files that are not there; returns whether all were."""
    caption = _one_line(row["caption"]).encode()
    files = dict(zip(export.keys(name, suffix), (row["jpg_0"], row["jpg_1"], caption, caption), strict=True))
    missing = [key for key, content in files.items() if not (key in export.present
                                                             and export.output.holds(key, len(content)))]
    for key in missing:
        export.output.write_bytes(key, files[key])
    return not missing


# -- beside the pairs


def _finish(export: _Export, key: str, card: bytes, licence: str) -> ExportedPairs:
    """Write the trainer's config, README.md and the data set's card; the result."""
    record, layout, output = export.record, export.layout, export.output
    shards = record.shards.values()
    sizes = sorted({size for shard in shards for size in shard.sizes})
    folder = output.local_path("")
    if not sizes or folder is None:
        raise InputError(f"{key} has no pair that {layout.title} can read: {_count_refused(record.refused)}")
    result = ExportedPairs(record.layout, key, sum(shard.read for shard in shards), record.written, export.existing,
                           dict(record.refused), sum(shard.joined for shard in shards), folder / layout.config_name)
    texts = {layout.config_name: layout.render_config(folder, key.split("/")[-1], sizes),
             README_NAME: _render_readme(result, layout, licence)}
    for name, content in ({name: text.encode() for name, text in texts.items()} | {CARD_NAME: card}).items():
        if name not in export.present or output.read_bytes(name) != content:
            output.write_bytes(name, content)
    return result


def _render_readme(result: ExportedPairs, layout: Layout, licence: str) -> str:
    refused = "".join(f"\n  - {reason}: {number:,}" for reason, number in sorted(result.refused.items()))
    return f"""# Preference pairs for {layout.title}

From the data set {result.triplets}, whose card is {CARD_NAME}. Licence: {licence}.

- pairs: {result.written:,}, of {result.read:,} read; refused: {sum(result.refused.values()):,}{refused}
- winners: `{layout.winners}/`, losers: `{layout.losers}/`, by the same name; beside each image its caption
  (`{layout.caption_suffix}`). Images are the stored bytes; captions of several lines made one: {result.joined:,}
- `{layout.config_name}` names this folder by its path: change it there after moving the folder.

{layout.notes}
"""


def _count_refused(refused: Counter[str]) -> str:
    return ", ".join(f"{reason}: {number:,}" for reason, number in sorted(refused.items())) or "it is empty"
