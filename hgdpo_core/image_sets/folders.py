"""Folders of images as users keep them, with captions in metadata files or in a .txt beside each image.

`metadata.jsonl` and `metadata.csv` (of any subfolder, whose `file_name` is relative to it) are what the `datasets`
library reads as an imagefolder. A .txt beside an image takes precedence over a line of metadata.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa

from hgdpo_core.errors import InputError
from hgdpo_core.image_sets.trees import local_tree
from hgdpo_core.images import IMAGE_SUFFIXES
from hgdpo_core.storage import PARALLEL_REQUESTS, Store, is_temporary
from hgdpo_core.storage.text_files import csv_rows, decode_text, json_lines

T = TypeVar("T")

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class CaptionedImage:
    """One file of the user's folder with its text."""

    path: Path
    caption: str


def find_captioned_images(folder: str) -> list[CaptionedImage]:
    """Images of a local folder with their captions, in name order; files are not opened here.

    InputError when the folder is missing, empty, or an image has no caption.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"images: {folder} is not a folder; expected images with metadata.jsonl or .txt captions")
    files, names = _files_and_images(root)
    captions, problems = read_captions(Store(str(root)), names, files)
    missing = [name for name in names if name not in captions]
    if problems:
        raise InputError(f"images: the caption of {root / min(problems)} cannot be read: {problems[min(problems)]}")
    if missing:
        raise InputError(f"images: {len(missing)} of {len(names)} images have no caption, the first is "
                         f"{root / missing[0]}: add a line to metadata.jsonl or a .txt file of the same name")
    return [CaptionedImage(root / name, captions[name]) for name in names]


def find_images(folder: Path) -> list[Path]:
    """Every image file below a local folder, in name order; InputError when there is none."""
    return [folder / name for name in _files_and_images(folder)[1]]


def _files_and_images(folder: Path) -> tuple[list[str], list[str]]:
    files = [name for name, *_ in local_tree(folder)[0]]
    images = select_images(files)
    if not images:
        raise InputError(f"images: {folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return files, images


def select_images(files: Iterable[str]) -> list[str]:
    """The images among relative paths, folder by folder in name order."""
    images = [name for name in files if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not is_temporary(name)
              and not PurePosixPath(name).name.startswith("._")]
    return sorted(images, key=lambda name: name.split("/"))


def caption_file(image: str) -> str:
    """The file of its own that the caption of an image may have."""
    return str(PurePosixPath(image).with_suffix(".txt"))


def read_captions(store: Store, images: Sequence[str],
                  files: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Captions of those `images` (keys of `store`) that have one, read from the metadata and text files of `files`,
    and why the text file of an image cannot be read.
    """
    known, requested = set(files), set(images)
    captions: dict[str, str] = {}
    metadata = [name for name in known if PurePosixPath(name).name in METADATA]
    for key in sorted(metadata, key=lambda name: (-name.count("/"), name)):  # the folder's own file comes last
        folder = key.rpartition("/")[0]
        for name, caption in _metadata(store, key):
            image = f"{folder}/{name}" if folder else name
            if image in requested:
                captions[image] = caption
    owners: dict[str, list[str]] = {}
    for name in images:
        if (text := caption_file(name)) in known:
            owners.setdefault(text, []).append(name)
    problems: dict[str, str] = {}
    for keys in batched(sorted(owners), 32 * PARALLEL_REQUESTS):
        for key, data in store.read_many(keys).items():
            try:
                captions |= dict.fromkeys(owners[key], decode_text(data, PurePosixPath(key).name).strip())
            except InputError as error:
                problems |= dict.fromkeys(owners[key], str(error))
    return {name: text for name, text in captions.items() if name not in problems}, problems


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of at most `size`, as itertools.batched of Python 3.12."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


def _metadata(store: Store, key: str) -> Iterator[tuple[str, str]]:
    """(file name, caption) of every line that has both; null and missing captions are left out."""
    url = store.url(key).removeprefix("file://")
    text = decode_text(store.read_bytes(key), url)
    is_table = key.endswith(".csv")
    for number, row in csv_rows(text, url) if is_table else json_lines(text, url):
        complete = isinstance(row, dict) and "file_name" in row and not row.keys().isdisjoint(CAPTION_COLUMNS)
        if is_table and not complete:
            raise InputError(f"{url} has no columns file_name and {' or '.join(CAPTION_COLUMNS)}: it has "
                             f"{', '.join(row) or 'none'}")
        if not complete or not isinstance(row["file_name"], str) or not isinstance(caption_of(row), str | None):
            raise InputError(f'line {number} of {url} is not {{"file_name": …, "text": …}}')
        if (caption := caption_of(row)) is not None:
            yield row["file_name"].removeprefix("./"), caption


def caption_of(row: Mapping[str, Any]) -> Any:
    """The caption in a row of a user's table, whatever its column is called; None where there is none."""
    return next((row[column] for column in CAPTION_COLUMNS if row.get(column) is not None), None)


class FolderReader:
    """The bytes of images that are files."""

    def __init__(self, store: Store):
        self._store = store

    def read(self, rows: pa.Table) -> Iterator[bytes | str]:
        """Of each row the bytes, or why there are none."""
        for names in batched(rows["name"].to_pylist(), PARALLEL_REQUESTS):
            found = self._store.read_many(names)
            yield from (found.get(name, "it is no longer there") for name in names)

    def close(self) -> None:
        """Nothing is kept open."""
