"""A data set of pairs in any of four forms: found, named by a revision, read a few rows at a time.

| format     | what it is                                                                                       |
|------------|--------------------------------------------------------------------------------------------------|
| parquet    | the columns of Pick-a-Pic v2: caption, jpg_0, jpg_1, label_0; also label_1, has_label, ...         |
| tars       | webdataset shards: 0001.jpg_0, 0001.jpg_1, and 0001.json with the other columns                  |
| hpd        | HPD v2: train.json with {prompt, file_path, human_preference}; train.tar.gz, or the image files  |
| json_lines | {prompt, winner, loser} a line, beside image files                                               |

The two public data sets: `yuvalkirstain/pickapic_v2` (959 040 training rows, 335 GB) and `ymhao/HPDv2` (645 000 pairs,
31.7 GB of images).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol, cast

import numpy as np
import pyarrow as pa

from hgdpo_core.config import UNKNOWN_LICENCE
from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.errors import InputError, StorageError
from hgdpo_core.image_sets.folders import FolderReader, batched, select_images
from hgdpo_core.image_sets.tars import TarReader
from hgdpo_core.pair_sets.files import PairFile, choose_split, identify_files, locate_pairs
from hgdpo_core.pair_sets.hpd import TARS, index_hpd, open_hpd
from hgdpo_core.pair_sets.indexed import INDEX, IndexedPairs, index_json_lines, index_tars, text_of, to_index
from hgdpo_core.pair_sets.rows import PairText
from hgdpo_core.pair_sets.tables import Images, TablePairs, count_rows
from hgdpo_core.storage import Store
from hgdpo_core.storage.scratch import cache_folder
from hgdpo_core.storage.shards import read_table, write_table

Format = Literal["parquet", "tars", "hpd", "json_lines"]
SUFFIXES: dict[str, Format] = {".parquet": "parquet", ".tar": "tars", ".jsonl": "json_lines", ".json": "hpd"}
INDEX_FORMAT = 2
"""Raised by hand when an index comes out differently: cached ones are made again."""
ROWS_AT_A_TIME = 10_000
SKIPPED = b"hgdpo.skipped"


class PairReader(Protocol):
    """Reads rows by their numbers, in ascending order."""

    def texts(self, rows: Sequence[int]) -> list[PairText]:
        """The rows without their images."""
        ...

    def images(self, rows: Sequence[int]) -> Iterator[Images]:
        """The two images of each row, as bytes, or why there are none."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


@dataclass(frozen=True)
class PairSet:
    """Pairs of a source, and which rows of it are read."""

    source: PairSource
    name: str
    """For people, and in fingerprints: a hub id, or the name of a folder or file."""
    revision: str
    """Commit of a hub id; else 12 hex digits for the bytes of the files."""
    licence: str
    format: Format
    base: str
    """Root of the store that holds the files."""
    files: tuple[PairFile, ...]
    rows_of_files: tuple[int, ...] = ()
    """Of Parquet files."""
    index: pa.Table | None = None
    """Of the other formats."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """What else is there and holds no pair that is read, by its kind."""

    def __len__(self) -> int:
        """Rows that are read, whether they are used or not."""
        return len(self.rows)

    @property
    def on_hub(self) -> bool:
        return self.base.startswith("hf://")

    def describe(self) -> str:
        """For people: which pairs, and how many are read."""
        kept = ", prompts about people only" if self.source.human_only else ""
        skipped = "".join(f"; skipped: {count:,} {what}" for what, count in self.skipped.items())
        return (f"{len(self):,} pairs of {self.name} (revision {self.revision[:12]}, licence {self.licence}{kept})"
                f"{skipped}")

    @property
    def total(self) -> int:
        """Rows of the files, which are no more than `limit` needs."""
        return sum(self.rows_of_files) if self.index is None else self.index.num_rows

    @cached_property
    def rows(self) -> Sequence[int]:
        """Numbers of the rows that are read, ascending: all, the first, or drawn by `sample_seed`."""
        limit, seed = self.source.limit, self.source.sample_seed
        if limit is None or limit >= self.total:
            return range(self.total)
        if seed is None:
            return range(limit)
        return np.sort(np.random.default_rng(seed).choice(self.total, limit, replace=False)).tolist()

    @property
    def shards(self) -> range:
        return range(-(-len(self) // self.source.rows_per_shard))

    def shard(self, index: int) -> Sequence[int]:
        """The rows of one shard."""
        size = self.source.rows_per_shard
        return self.rows[index * size:(index + 1) * size]

    @contextmanager
    def reader(self, is_used: Callable[[PairText], bool], check_stop: Callable[[], object]) -> Iterator[PairReader]:
        """Reads the rows. Of HPD v2 it first unpacks the images of all rows that are used, and may take an hour."""
        with closing(self._open(is_used, check_stop)) as reader:
            yield reader

    def _open(self, is_used: Callable[[PairText], bool], check_stop: Callable[[], object]) -> PairReader:
        store, keys = Store(self.base), [file.key for file in self.files]
        if self.index is None:
            return TablePairs(store, keys, self.rows_of_files)
        if self.format == "tars":
            return IndexedPairs(self.index, TarReader(store, keys))
        if self.format == "json_lines":
            return IndexedPairs(self.index, FolderReader(store))
        return open_hpd(store, self.index, self.files, f"{self.name}@{self.revision}", self._used_images(is_used),
                        check_stop)

    def _used_images(self, is_used: Callable[[PairText], bool]) -> set[str]:
        assert self.index is not None
        names: set[str] = set()
        for part in batched(self.rows, ROWS_AT_A_TIME):
            for row in self.index.take(pa.array(part, pa.int64())).to_pylist():
                if is_used(text_of(row)):
                    names |= {row["image_0"], row["image_1"]}
        return names


def open_pair_set(source: PairSource, *, leave_out: Path | None = None) -> PairSet:
    """Find the pairs of a source. Read are footers of Parquet files or the texts of the others, and no image.

    InputError when there is no pair, or the files are not of a known form; StorageError when the hub is out of reach.
    `leave_out`: the root of the results, which may be below the pairs.
    """
    located = locate_pairs(source, leave_out=leave_out)
    form, files = _choose_files(source, located.files)
    skipped = Counter({"files of another split or kind": len(located.files) - len(files)})
    store = Store(located.base)
    rows_of_files, index = list[int](), None
    if form == "parquet":
        rows_of_files = count_rows(store, [file.key for file in files],
                                   source.limit if source.sample_seed is None else None)
        files = files[:len(rows_of_files)]
    else:
        index = _cached_index(store, form, files)
        skipped.update(json.loads((index.schema.metadata or {}).get(SKIPPED, b"{}")))
    revision = located.commit or identify_files(located.base, files)
    pairs = PairSet(source, located.name, revision, source.licence or located.licence or UNKNOWN_LICENCE, form,
                    located.base, tuple(files), tuple(rows_of_files), index, dict(+skipped))
    if not pairs.total:
        raise InputError(f"pairs: {source.source} holds no pair in {files[0].key}")
    return pairs


def _choose_files(source: PairSource, files: Sequence[PairFile]) -> tuple[Format, list[PairFile]]:
    """The format, and the files of the split: those with the texts first, then what they name."""
    form = _format_of(source, files)
    texts = [file for file in files if SUFFIXES.get(PurePosixPath(file.key).suffix.lower()) == form]
    if not texts:
        suffix = next(suffix for suffix, one in SUFFIXES.items() if one == form)
        raise InputError(f"pairs: {source.source} holds no {suffix} file, but format is {form}: correct or drop it")
    chosen = choose_split(texts, source)
    images = set(select_images([file.key for file in files]))
    beside = [file for file in sorted(files) if file.key in images]
    if form == "json_lines":
        return form, chosen + beside
    if form != "hpd":
        return form, chosen
    if len(chosen) > 1:
        raise InputError(f"pairs: {source.source} holds {len(chosen)} .json files of the split {source.split}: give "
                         "the path of one of them")
    stem = chosen[0].key.removesuffix(".json")
    packed = [file for file in files if file.key in {stem + suffix for suffix in TARS}]
    if not packed and not beside:
        raise InputError(f"pairs: {source.source} holds {chosen[0].key}, but neither {stem}.tar.gz nor image files")
    return form, chosen + (packed or beside)


def _format_of(source: PairSource, files: Sequence[PairFile]) -> Format:
    if source.format != "auto":
        return cast(Format, source.format)
    names = {PurePosixPath(file.key).name for file in files}
    if f"{source.split}.json" in names:
        return "hpd"
    found = {SUFFIXES[suffix] for name in names if (suffix := PurePosixPath(name).suffix.lower()) in SUFFIXES}
    kinds = found - {"hpd"} or found  # other .json files describe a data set
    if len(kinds) == 1:
        return cast(Format, kinds.pop())
    if kinds:
        raise InputError(f"pairs: {source.source} holds files of several forms, {', '.join(sorted(kinds))}: name one "
                         "in format")
    raise InputError(f"pairs: {source.source} holds no pairs: expected .parquet or .tar files with the columns of "
                     "Pick-a-Pic v2, train.json with train.tar.gz as HPD v2, or a .jsonl of {prompt, winner, loser}")


def _cached_index(store: Store, form: Format, files: Sequence[PairFile]) -> pa.Table:
    """The index, from the cache while no file's size or time has changed: tars are gone through only once."""
    state = "\n".join(f"{file.key}|{file.bytes}|{file.changed}" for file in files)
    key = f"{hashlib.sha256(f'{INDEX_FORMAT} {store.root} {form} {state}'.encode()).hexdigest()[:24]}.parquet"
    cache = Store(str(cache_folder("pairs")))
    with suppress(StorageError):  # not cached yet
        index = read_table(cache, key)
        if index.schema.equals(INDEX):
            return index
    skipped = Counter[str]()
    index = to_index(_index_rows(store, form, [file.key for file in files], skipped))
    index = index.replace_schema_metadata({SKIPPED: json.dumps(skipped).encode()})
    with suppress(StorageError):  # a cache that cannot be written costs time, not correctness
        write_table(cache, key, index)
    return index


def _index_rows(store: Store, form: Format, keys: Sequence[str], skipped: Counter[str]) -> Iterator[dict]:
    if form == "tars":
        return index_tars(store, keys, skipped)
    if form == "json_lines":
        return index_json_lines(store, list(_with_suffix(keys, ".jsonl")))
    return index_hpd(store, next(iter(_with_suffix(keys, ".json"))))


def _with_suffix(keys: Iterable[str], suffix: str) -> Iterator[str]:
    return (key for key in keys if key.lower().endswith(suffix))
