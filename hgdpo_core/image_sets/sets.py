"""A user's captioned images, in any of three forms: found, named by an id, read a few at a time.

| kind    | what it is                                                                       |
|---------|----------------------------------------------------------------------------------|
| folder  | image files; captions in metadata.jsonl, metadata.csv or a .txt beside each      |
| tars    | webdataset shards: 0001.jpg with 0001.txt or 0001.json                           |
| parquet | columns image (bytes, or a struct with bytes) and text, caption or prompt        |

An address is a path or an fsspec URL of a folder, a file, or a pattern such as `s3://bucket/set-{000..127}.tar`. Images
stay where they are: memory holds an index of some hundred bytes per image.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import pyarrow as pa

from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import ConfigError, InputError, StorageError
from hgdpo_core.image_sets.folders import METADATA, FolderReader, batched, caption_file, read_captions, select_images
from hgdpo_core.image_sets.tables import TableReader, index_tables
from hgdpo_core.image_sets.tars import TarReader, index_tars
from hgdpo_core.image_sets.trees import local_tree
from hgdpo_core.images import IMAGE_SUFFIXES, any_converted
from hgdpo_core.models.fingerprints import hash_files
from hgdpo_core.progress import count_of
from hgdpo_core.prompts.sources import LOCAL_PROTOCOLS, refuse_secret_address
from hgdpo_core.storage import Store, is_temporary, scratch_folder
from hgdpo_core.storage.roots import local_address
from hgdpo_core.storage.scratch import cache_folder
from hgdpo_core.storage.shards import read_table, write_table

Kind = Literal["folder", "tars", "parquet"]
IMAGES_PER_SHARD = 256
CAPTIONING: dict[Kind, str] = {
    "folder": "`hgdpo caption --images FOLDER` writes them; or add a metadata.jsonl, or a .txt beside each",
    "tars": "put a .txt beside each in its tar, or unpack them into a folder, for which `hgdpo caption` writes them",
    "parquet": "fill its column, or unpack them into a folder, for which `hgdpo caption` writes them",
}
INDEX = pa.schema([("name", pa.string()), ("caption", pa.string()), ("file", pa.int32()), ("start", pa.int64()),
                   ("bytes", pa.int64()), ("problem", pa.string())])
"""`file` counts in ImageSet.files, `start` is a byte of a tar or a row of a table; a folder needs the name alone.
`problem`: why an existing caption cannot be read."""
INDEX_FORMAT = 2
"""Raised by hand when an index comes out differently: cached ones are made again."""
CONVERTED = b"converted"
SKIPPED = b"passed_over"
WILD = re.compile(r"[*?\[{]")
BRACES = re.compile(r"\{([^{}]*)\}")
SUFFIXES: dict[str, Kind] = {".tar": "tars", ".parquet": "parquet"}
MOST_FILES = 100_000
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".zip")


class _File(NamedTuple):
    key: str
    bytes: int
    changed: float


@dataclass(frozen=True)
class ImageSet:
    """Captioned images at an address, and a row of INDEX for each. The id follows from the bytes of all of them, or at
    a remote address from names, sizes and times of the files."""

    address: str
    id: str
    kind: Kind
    base: str
    """Root of the store that holds the files."""
    files: tuple[str, ...]
    """Keys of all that the set is made of; of tars and tables in the order that `file` counts."""
    index: pa.Table
    skipped: Mapping[str, int] = field(default_factory=dict)
    """What is at the address and is not an image of the set, by reason."""

    @property
    def converted(self) -> bool:
        """Whether some image may have a profile or transparency, and so other pixels than before these counted."""
        return (self.index.schema.metadata or {}).get(CONVERTED) == b"yes"

    def describe(self) -> str:
        """One line: how many images, and what was skipped."""
        parts = [f"{count} {reason}" for reason, count in self.skipped.items()]
        return count_of(len(self), "image") + (f"; skipped: {', '.join(parts)}" if parts else "")

    def __len__(self) -> int:
        return self.index.num_rows

    @property
    def shards(self) -> range:
        return range((len(self) + IMAGES_PER_SHARD - 1) // IMAGES_PER_SHARD)

    def shard(self, index: int) -> pa.Table:
        """The rows of one shard's images."""
        return self.index.slice(index * IMAGES_PER_SHARD, IMAGES_PER_SHARD)

    @property
    def folder(self) -> Path | None:
        """The folder that holds all files; None where it is not on this machine."""
        return Store(self.base).local_path("")

    @contextmanager
    def reader(self) -> Iterator[FolderReader | TarReader | TableReader]:
        """Its `read(rows)` yields the bytes of each row, or a text with the reason why there are none."""
        store = Store(self.base)
        kinds = {"folder": lambda: FolderReader(store), "tars": lambda: TarReader(store, self.files),
                 "parquet": lambda: TableReader(store, self.files)}
        with closing(kinds[self.kind]()) as reader:
            yield reader


def read_image_set(address: str, *, known_id: str | None = None, leave_out: Path | None = None) -> ImageSet:
    """Find the images and captions at an address; the id changes when a byte of either changes (see ImageSet).

    With `known_id` the bytes are not read for one. InputError when there is no image, or when over half have no
    caption: fewer are skipped later. `leave_out`: the root of the results, which may be below the images.
    """
    store, files, skipped = list_files(address, leave_out=leave_out)
    kind = _kind_of(address, files)
    keys = [file.key for file in files]
    if kind == "folder":
        names = select_images(keys)
        needed = {*names, *map(caption_file, names)}
        chosen = [file for file in files if file.key in needed or PurePosixPath(file.key).name in METADATA]
    else:
        chosen = sorted((file for file in files if SUFFIXES.get(_suffix(file.key)) == kind),
                        key=lambda file: file.key.split("/"))
    index = _cached_index(store, kind, chosen)
    if not index.num_rows:
        raise InputError(f"images: the {kind} of {address} hold no image ({', '.join(IMAGE_SUFFIXES)})")
    without = [name for name, caption in zip(index["name"].to_pylist(), index["caption"].to_pylist(), strict=True)
               if not (caption or "").strip()]
    if 2 * len(without) > index.num_rows:
        raise InputError(f"images: {len(without)} of {index.num_rows} images have no caption, the first is "
                         f"{without[0]} of {address}: {CAPTIONING[kind]}")
    used = dict.fromkeys(file.key for file in chosen)
    inside = json.loads((index.schema.metadata or {}).get(SKIPPED, b"{}"))  # of tars
    others = Counter(f"files of the kind {_suffix(key) or 'without a suffix'}" for key in keys if key not in used)
    set_id = known_id or _identify(store, kind, chosen, index)
    return ImageSet(address, set_id, kind, base=store.root, files=tuple(used), index=index,
                    skipped=dict(skipped + others + Counter(inside)))


def _suffix(key: str) -> str:
    return PurePosixPath(key).suffix.lower()


# -- which files


def list_files(address: str, *, leave_out: Path | None = None) -> tuple[Store, list[_File], Counter[str]]:
    """The files at an address, all of a folder's, and what was skipped; InputError when there is no such address.

    Keys are those of the returned store.
    """
    protocol, remote, _ = address.partition("://")
    if remote and protocol.lower() not in LOCAL_PROTOCOLS:
        refuse_secret_address(address, "images")
        if protocol.lower() in ("http", "https"):
            raise InputError(f"images: {address} cannot be listed over http: download it, or give a path or the URL of "
                             "a bucket")
        return _list_below(address, address)
    try:
        path = Path(local_address(address)).expanduser()
    except ConfigError as error:
        raise InputError(f"images: {error}") from None
    if not path.exists() and not WILD.search(str(path)):
        raise InputError(f"images: {address} is not a folder; expected images with metadata.jsonl or .txt captions, "
                         "or .tar or .parquet files")
    if leave_out is not None and os.path.realpath(path) == os.path.realpath(leave_out):
        raise InputError(f"images: {address} is the root of the results too: give another --root, or the folder with "
                         "the images alone")
    return _list_below(str(path.absolute()), address, literal=path.exists(), leave_out=leave_out)


def _list_below(path: str, address: str, *, literal: bool = False,
                leave_out: Path | None = None) -> tuple[Store, list[_File], Counter[str]]:
    base, pattern = path.rstrip("/"), "*"
    if not literal and (wild := WILD.search(path)):
        cut = path.rindex("/", 0, wild.start())
        base, pattern = path[:cut], path[cut + 1:]
    elif _suffix(path) in SUFFIXES and not (literal and Path(path).is_dir()):
        base, _, pattern = base.rpartition("/")
        pattern = re.sub(r"([*?\[])", r"[\1]", pattern)
    try:
        store = Store(base or "/")
    except ConfigError as error:
        raise InputError(f"images: {address} is not a usable address: {error}") from None
    folder = store.local_path("")
    tree, skipped = (store.walk(), Counter[str]()) if folder is None else local_tree(folder, leave_out=leave_out)
    below = [_File(*found) for found in tree if not is_temporary(found[0])]
    return store, _matching(below, expand_braces(pattern), address), skipped


def _matching(files: list[_File], patterns: Sequence[str], address: str) -> list[_File]:
    if patterns == ["*"]:
        return files
    matching: dict[str, _File] = {}
    for pattern in patterns:
        found = {file.key: file for file in files if fnmatchcase(file.key, pattern)}
        if not found:
            raise InputError(f"images: nothing is called {pattern} at {address}: expected .tar or .parquet files")
        matching |= found
    if any(_suffix(key) in IMAGE_SUFFIXES for key in matching):
        raise InputError(f"images: {address} is a pattern of image files: give their folder; patterns are for .tar and "
                         ".parquet files")
    return list(matching.values())


def expand_braces(pattern: str) -> list[str]:
    """`{a,b}` and `{000..127}` written out, as a shell and webdataset do."""
    braces = BRACES.search(pattern)
    if braces is None:
        return [pattern]
    first, dots, last = braces[1].partition("..")
    items = braces[1].split(",")
    if dots and first.isdecimal() and last.isdecimal():
        if int(last) - int(first) >= MOST_FILES:
            raise InputError(f"images: {braces[0]} stands for {int(last) - int(first) + 1} files: expected at most "
                             f"{MOST_FILES}; give * instead")
        items = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    rests = expand_braces(pattern[braces.end():])
    if len(items) * len(rests) > MOST_FILES:
        raise InputError(f"images: {pattern} stands for {len(items) * len(rests)} files: expected at most "
                         f"{MOST_FILES}; give * instead")
    return [f"{pattern[:braces.start()]}{item}{rest}" for item in items for rest in rests]


def _kind_of(address: str, files: list[_File]) -> Kind:
    suffixes = {_suffix(file.key) for file in files}
    if suffixes & set(IMAGE_SUFFIXES):
        return "folder"
    kinds: set[Kind] = {SUFFIXES[suffix] for suffix in suffixes & set(SUFFIXES)}
    if len(kinds) == 1:
        return kinds.pop()
    if kinds:
        raise InputError(f"images: {address} holds .tar and .parquet files: give a pattern for one of them, such as "
                         f"{address.rstrip('/')}/*.tar")
    packed = next((file.key for file in files if file.key.lower().endswith(COMPRESSED)), None)
    if packed:
        raise InputError(f"images: {packed} in {address} is compressed, which cannot be read image by image: unpack it")
    raise InputError(f"images: {address} holds no image ({', '.join(IMAGE_SUFFIXES)}) and no .tar or .parquet file")


# -- what is in them


def _cached_index(store: Store, kind: Kind, files: list[_File]) -> pa.Table:
    """The index, from the cache while no file's size or time has changed: captions and tars are read only once."""
    state = "\n".join(f"{file.key}|{file.bytes}|{file.changed}" for file in sorted(files))
    key = f"{hashlib.sha256(f'{INDEX_FORMAT} {store.root} {kind} {state}'.encode()).hexdigest()[:24]}.parquet"
    cache = Store(str(cache_folder("images")))
    with suppress(StorageError):  # not cached yet
        index = read_table(cache, key)
        if index.schema.equals(INDEX):
            return index
    index = _read_index(store, kind, [file.key for file in files])
    with suppress(StorageError):  # a cache that cannot be written costs time, not correctness
        write_table(cache, key, index)
    return index


def _read_index(store: Store, kind: Kind, keys: list[str]) -> pa.Table:
    if kind == "folder":
        names = select_images(keys)
        captions, problems = read_captions(store, names, keys)
        nothing = pa.nulls(len(names))
        index = pa.table([names, [captions.get(name) for name in names], nothing, nothing, nothing,
                          [problems.get(name) for name in names]], names=INDEX.names).cast(INDEX)
        folder = store.local_path("")
        return _with_facts(index, folder is None or any_converted(folder / name for name in names), {})
    skipped: Counter[str] = Counter()
    rows = index_tars(store, keys, skipped) if kind == "tars" else index_tables(store, keys)
    batches = [pa.RecordBatch.from_pylist(part, schema=INDEX) for part in batched(rows, 10_000)]
    # whether they are converted is not known: all images would have to be read
    return _with_facts(pa.Table.from_batches(batches, schema=INDEX).combine_chunks(), True, skipped)


def _with_facts(index: pa.Table, converted: bool, skipped: Mapping[str, int]) -> pa.Table:
    return index.replace_schema_metadata({CONVERTED: b"yes" if converted else b"no",
                                          SKIPPED: json.dumps(skipped).encode()})


def _identify(store: Store, kind: Kind, files: list[_File], index: pa.Table) -> str:
    names, captions = index["name"].to_pylist(), index["caption"].to_pylist()
    keys = names if kind == "folder" else [file.key for file in files]
    folder = store.local_path("")
    if folder is None:
        states = {file.key: [file.bytes, file.changed] for file in files}
        parts = [[key, *states[key]] for key in keys]
    else:
        # a folder's images by their bare names: so its id was made before there were other kinds
        try:
            hashes = hash_files([folder / key for key in keys])
        except OSError as error:
            raise InputError(f"images: {error.filename} cannot be read: {error.strerror}") from None
        parts = [[key.rpartition("/")[2], digest] for key, digest in zip(keys, hashes, strict=True)]
    if kind == "folder":
        parts = [[*part, caption] for part, caption in zip(parts, captions, strict=True)]
    return f"{index.num_rows}-{content_hash(parts)}"


# -- for workers elsewhere


def locate_images(store: Store, images: ImageSet, *, copy_to_store: bool) -> str:
    """Where a worker finds the images: their own address, or with `copy_to_store` their key in the store after a copy.

    A set that has a URL of its own is never copied.
    """
    folder = images.folder
    if folder is None:
        return images.address
    if not copy_to_store:
        return images.address if "://" in images.address else str(Path(images.address).expanduser().absolute())
    key = f"images/{images.id}"
    if not store.exists(f"{key}/complete.json"):
        with scratch_folder() as links:
            for name in images.files:
                link = links / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(folder / name)
            store.put_folder(links, key)
        store.write_json(f"{key}/complete.json", {"images": len(images)})
    return key


def open_located_images(store: Store, address: str, images_id: str) -> ImageSet:
    """The images at an address of `locate_images`; InputError when they are no longer those of `images_id`."""
    if address == f"images/{images_id}":
        return read_image_set(store.url(address), known_id=images_id)
    images = read_image_set(address, leave_out=store.local_path(""))
    if images.id != images_id:
        raise InputError(f"the images in {address} are {images.id}, this training was planned with {images_id}: start "
                         "the run that planned it again")
    return images
