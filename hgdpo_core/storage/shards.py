"""Shards: the unit of commit. Data goes to a file named by its hash, then one small manifest makes it true.

No rename and no conditional write is needed, so any S3 server will do. Content is not assumed bit-identical
between writers: a writer yields to a valid manifest it finds, and if two race, either one is valid. Readers
open only what a manifest names. A shard whose recorded inputs changed does not exist, so nothing is
ever stale.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from hgdpo_core import __version__
from hgdpo_core.config.base import canonical_json, content_hash
from hgdpo_core.errors import ConfigError, CorruptShardError, InputError, StorageError
from hgdpo_core.storage import PARALLEL_REQUESTS, MissingKeyError, Store

FORMAT_VERSION = 1
EXPECTED = "expected"
"""The one entry of a folder's config outside its hash: how many shards and rows there should be. It may
change, so that a prompt list that grows finds its finished shards again."""
ENDED = "ended"
"""In a manifest's details: how many units were begun, counted as work, and left out of the rows by design."""
MANIFEST_NAME = re.compile(r"shard-(\d{5,})\.json")
DATA_NAME = re.compile(r"shard-(\d{5,})-[0-9a-f]{12}\.parquet")

_ROW_GROUP_BYTES = 64 * 2**20       # what a public trainer that streams the file holds at a time
_SMALL_BYTES = 2**20                # read in one request
_COMMIT_TRIES = 3
_READ_TRIES = 4                     # the network may spoil what is whole in the store


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputShard(_Record):
    """A data file that another shard was made from."""

    key: str
    sha256: str


class ShardManifest(_Record):
    """The only truth about one shard. `columns`: name -> Arrow type. `details`: the stage's own facts."""

    format_version: int
    index: int
    file: str
    rows: int
    bytes: int
    sha256: str
    columns: dict[str, str]
    config_hash: str
    inputs: tuple[InputShard, ...]
    libraries: dict[str, str]
    code_version: str
    device: str
    batch_size: int | None
    seconds: float
    created_at: str
    details: dict[str, Any]

    @property
    def units(self) -> int:
        """Units that the work was counted in: rows, and those that were begun and not finished."""
        return self.rows + self.details.get(ENDED, 0)


class ShardFolder:
    """The shards of one stage: `config.json`, data files, manifests, `rejected/` and `quarantine/`."""

    def __init__(self, store: Store, key: str, config: Mapping[str, Any]):
        """For `create` and `open`, which agree with `config.json`; use those."""
        self.store, self.key, self.config = store, key, dict(config)
        self.config_hash = _hash_of(self.config)

    @classmethod
    def create(cls, store: Store, key: str, config: Mapping[str, Any]) -> Self:
        """Write `config.json`, or find the same one there; ConfigError names the first setting that differs.

        The entry `expected` is outside the comparison and the hash; the newest one is kept.
        """
        given = json.loads(canonical_json(config))
        if _read_config(store, key) != given:
            _refuse_other(store, key, given)
            store.write_json(f"{key}/config.json", given)
            _refuse_other(store, key, given)       # another run may have written another one at the same moment
        return cls(store, key, given)

    @classmethod
    def open(cls, store: Store, key: str) -> Self:
        """The folder as its `config.json` describes it; StorageError when there is none."""
        folder = cls.open_if_readable(store, key)
        if folder is None:
            raise StorageError(f"{store.url(key)} holds no readable config.json: expected a folder of shards; run the "
                               "stage that makes it first")
        return folder

    @classmethod
    def open_if_readable(cls, store: Store, key: str) -> Self | None:
        """The folder, None where there is no readable `config.json`."""
        config = _read_config(store, key)
        return None if config is None else cls(store, key, config)

    # -- which shards exist

    def manifests(self, among: Iterable[int] | None = None) -> dict[int, ShardManifest]:
        """Every committed shard, or those `among` some indices, sorted: one LIST, then many manifests at a time."""
        sizes = self.store.list(self.key)
        indices = {f"{self.key}/{name}": int(match[1]) for name in sizes if (match := MANIFEST_NAME.fullmatch(name))}
        if among is not None:
            requested = set(among)
            indices = {key: index for key, index in indices.items() if index in requested}
        found = {indices[key]: self._parse(data, indices[key]) for key, data in self.store.read_many(indices).items()}
        return {index: manifest for index, manifest in sorted(found.items())
                if manifest is not None and sizes.get(manifest.file) == manifest.bytes}

    def listed(self) -> set[int]:
        """Indices with a manifest of any content: one LIST, to follow the progress of others."""
        return {int(match[1]) for name in self.store.list(self.key) if (match := MANIFEST_NAME.fullmatch(name))}

    def find(self, index: int, inputs: Sequence[InputShard] | None = None) -> ShardManifest | None:
        """The shard's manifest if the shard exists; with `inputs`, only if it was made from exactly these."""
        key = self._manifest_key(index)
        data = self.store.read_many([key]).get(key)
        manifest = None if data is None else self._parse(data, index)
        if manifest is None or (inputs is not None and manifest.inputs != tuple(inputs)):
            return None
        return manifest if self.store.size(f"{self.key}/{manifest.file}") == manifest.bytes else None

    def completed(self, expected: Iterable[int]) -> set[int]:
        """Those of the `expected` indices whose shards exist."""
        return set(expected) & self.manifests().keys()

    def input_shard(self, index: int, *, manifest: ShardManifest | None = None) -> InputShard:
        """What a stage that reads this shard records; StorageError when there is no such shard."""
        manifest = manifest or self._require(index)
        return InputShard(key=f"{self.key}/{manifest.file}", sha256=manifest.sha256)

    # -- writing

    def commit(self, index: int, table: pa.Table, *, inputs: Sequence[InputShard] = (), device: str = "cpu",
               batch_size: int | None = None, seconds: float = 0.0,
               details: Mapping[str, Any] | None = None) -> ShardManifest:
        """Make the shard exist and return its manifest; another writer's, if that one came first.

        `seconds`: how long the work took. Killed at any point, it leaves either the shard or no shard.
        """
        data = _to_parquet(table)
        digest = hashlib.sha256(data).hexdigest()
        manifest = ShardManifest(
            format_version=FORMAT_VERSION, index=index, file=f"shard-{index:05d}-{digest[:12]}.parquet",
            rows=table.num_rows, bytes=len(data), sha256=digest,
            columns={field.name: str(field.type) for field in table.schema},
            config_hash=self.config_hash, inputs=tuple(inputs), libraries=_library_versions(),
            code_version=__version__, device=device, batch_size=batch_size, seconds=seconds,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"), details=dict(details or {}))
        data_key = f"{self.key}/{manifest.file}"
        for _ in range(_COMMIT_TRIES):
            if not self.store.holds(data_key, len(data)):
                self.store.write_bytes(data_key, data)
            if (found := self.find(index, inputs)) is not None:
                return found
            self.store.write_json(self._manifest_key(index), manifest.model_dump(mode="json"))
            # Look at what is there now: another writer may have come last, or a clean-up taken the data.
            if (found := self.find(index, inputs)) is not None:
                return found
        raise StorageError(f"{self.store.url(self._manifest_key(index))} does not stay as written, "
                           f"{_COMMIT_TRIES} times: another run makes it from other inputs; stop one of them")

    def reject(self, name: str, table: pa.Table) -> None:
        """Keep rows that no later stage may use, with their reason; the same `name` is replaced whole."""
        write_table(self.store, f"{self.key}/rejected/{name}.parquet", table)

    def rejected(self) -> dict[str, int]:
        """Name -> rows of every rejected table; they are read back with `read_table`."""
        names = [name.removesuffix(".parquet") for name in self.store.list(f"{self.key}/rejected")
                 if name.endswith(".parquet")]
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return dict(zip(names, pool.map(self._count_rejected, names), strict=True))

    # -- reading

    def read(self, index: int, columns: Sequence[str] | None = None, *, manifest: ShardManifest | None = None,
             schema: pa.Schema | None = None) -> pa.Table:
        """The shard's table, its sha256 verified even if only some `columns` are requested.

        StorageError when there is no such shard, or when one of `schema`'s columns is missing or of another type;
        CorruptShardError when its bytes are wrong: then its files are moved to `quarantine/`, so that the next run
        makes it again. InputError for unknown columns.
        """
        manifest = manifest or self._require(index)
        key = f"{self.key}/{manifest.file}"
        for _ in range(_READ_TRIES):
            data = self.store.read_bytes(key, size=manifest.bytes)
            if _is_intact(data, manifest):
                table = _from_parquet(pa.BufferReader(data), self.store.url(key), columns)
                return table if schema is None else _with_columns(table, schema, self.store.url(key))
        raise self._quarantine(manifest)

    def read_columns(self, index: int, columns: Sequence[str], *, manifest: ShardManifest | None = None) -> pa.Table:
        """Some columns, fetching only their bytes where the shard is large (small ones beside images).

        Then the sha256 is NOT verified, only the checksums of the Parquet pages. StorageError for a broken file.
        """
        manifest = manifest or self._require(index)
        if manifest.bytes <= _SMALL_BYTES:
            return self.read(index, columns, manifest=manifest)
        key = f"{self.key}/{manifest.file}"
        for _ in range(_READ_TRIES - 1):
            with contextlib.suppress(_BrokenParquetError), self.store.open(key) as file:
                return _from_parquet(file, self.store.url(key), columns)
        with self.store.open(key) as file:
            return _from_parquet(file, self.store.url(key), columns)

    # -- below

    def _manifest_key(self, index: int) -> str:
        return f"{self.key}/shard-{index:05d}.json"

    def _parse(self, data: bytes, index: int) -> ShardManifest | None:
        try:
            manifest = ShardManifest.model_validate_json(data)
        except ValidationError:
            return None
        name = DATA_NAME.fullmatch(manifest.file)
        valid = (manifest.format_version == FORMAT_VERSION and manifest.config_hash == self.config_hash
                 and manifest.index == index and name is not None and int(name[1]) == index)
        return manifest if valid else None

    def _require(self, index: int) -> ShardManifest:
        manifest = self.find(index)
        if manifest is None:
            raise StorageError(f"shard {index} of {self.store.url(self.key)} does not exist (no valid "
                               "manifest, or its data file is missing): run the stage that makes it")
        return manifest

    def _quarantine(self, manifest: ShardManifest) -> CorruptShardError:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        pairs = [(f"{self.key}/{name}", f"{self.key}/quarantine/{stamp}-{name}")
                 for name in (manifest.file, f"shard-{manifest.index:05d}.json")]
        # Data first: from here on the manifest names a missing file, so the shard is gone even if we are
        # killed, and no writer of the same content takes the broken file for its own.
        for key, new_key in pairs:
            try:
                if key.endswith(".parquet") or self._still_names(manifest):
                    self.store.move(key, new_key)
            except MissingKeyError:
                continue            # another reader moved it
        return CorruptShardError(
            f"{self.store.url(pairs[0][0])} is not what {self.store.url(pairs[1][0])} records: expected "
            f"{manifest.bytes} bytes of sha256 {manifest.sha256[:12]}...; both were moved to quarantine/ "
            "beside them; the next run makes this shard again")

    def _still_names(self, manifest: ShardManifest) -> bool:
        """Whether the manifest is still this one: the shard may have been made again meanwhile."""
        current = self._parse(self.store.read_bytes(self._manifest_key(manifest.index)), manifest.index)
        return current is not None and current.file == manifest.file

    def _count_rejected(self, name: str) -> int:
        with self.store.open(f"{self.key}/rejected/{name}.parquet") as file:
            return pq.ParquetFile(file).metadata.num_rows


class _BrokenParquetError(StorageError):
    """What was read is not Parquet, or not the pages that were written."""


def write_table(store: Store, key: str, table: pa.Table) -> None:
    """One Parquet file outside any shard folder (prompts, plans); appears whole or not at all."""
    store.write_bytes(key, _to_parquet(table))


def read_table(store: Store, key: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file written by `write_table`; StorageError when it is missing or not Parquet."""
    return _from_parquet(pa.BufferReader(store.read_bytes(key)), store.url(key), columns)


def _to_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    # zstd steps over what does not shrink, such as PNG bytes. Images would only fill up dictionaries in vain.
    # "Compliant" nested types would rename the items of lists: the table would return with another schema.
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    rows = max(1, table.num_rows * _ROW_GROUP_BYTES // max(1, table.nbytes))
    pq.write_table(table, sink, compression="zstd", compression_level=1, row_group_size=rows,
                   use_compliant_nested_type=False, write_page_checksum=True,
                   use_dictionary=texts)  # pyright: ignore[reportArgumentType]: the stub knows only bool
    return sink.getvalue()


def _from_parquet(file: Any, name: str, columns: Sequence[str] | None) -> pa.Table:
    try:
        source = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
        known = source.schema_arrow.names
        unknown = [column for column in columns or () if column not in known]
        if unknown:
            raise InputError(f"{name} has no column {', '.join(unknown)}; it has {', '.join(known)}")
        return source.read(columns=None if columns is None else list(columns))
    except StorageError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise _BrokenParquetError(f"{name} is not a readable Parquet file ({' '.join(str(error).split())[:200]}): "
                                  "delete it and run its stage again") from None


def _with_columns(table: pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    wrong = [f"{field.name} ({field.type})" for field in schema
             if field.name not in table.schema.names or table.schema.field(field.name).type != field.type]
    if wrong:
        raise StorageError(f"{name} does not have the columns of its stage: expected {', '.join(wrong)}, got "
                           f"{', '.join(f'{field.name} ({field.type})' for field in table.schema)}; something else "
                           "wrote it: delete its folder, or use another root")
    return table


def _is_intact(data: bytes, manifest: ShardManifest) -> bool:
    return len(data) == manifest.bytes and hashlib.sha256(data).hexdigest() == manifest.sha256


def _hash_of(config: Mapping[str, Any]) -> str:
    return content_hash({name: value for name, value in config.items() if name != EXPECTED})


def _read_config(store: Store, key: str) -> dict[str, Any] | None:
    try:
        config = json.loads(store.read_bytes(f"{key}/config.json"))
    except (MissingKeyError, ValueError):
        return None                 # half-written by a store that cannot do better: as good as none
    return config if isinstance(config, dict) else None


def _refuse_other(store: Store, key: str, given: dict[str, Any]) -> None:
    found = _read_config(store, key)
    if found is not None and _hash_of(found) != _hash_of(given):
        raise ConfigError(f"{store.url(key)} was made with other settings: {_first_difference(found, given)}"
                          "; use another root, or the settings it was made with")


def _first_difference(found: Any, given: Any, name: str = "") -> str:
    if isinstance(found, dict) and isinstance(given, dict):
        for key in sorted(found.keys() | given.keys()):
            dotted = f"{name}.{key}" if name else key
            if dotted == EXPECTED or (key in found and key in given and found[key] == given[key]):
                continue
            return _first_difference(found.get(key, "nothing"), given.get(key, "nothing"), dotted)
    return f"{name} is {found!r} there, {given!r} now"


@functools.cache
def _library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "pyarrow"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


# -- ranges of shards as text


def format_range(indices: Iterable[int]) -> str:
    """Ascending indices as text: 0, 1, 2 and 5 are "0-2,5"."""
    runs = (list(group) for _, group in groupby(enumerate(sorted(indices)), lambda item: item[1] - item[0]))
    return ",".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)


def parse_range(text: str) -> list[int]:
    """The indices that `format_range` wrote, ascending."""
    bounds = [part.partition("-") for part in text.split(",")]
    return sorted({index for first, _, last in bounds for index in range(int(first), int(last or first) + 1)})
