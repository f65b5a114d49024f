"""Folders of images as people keep them, with captions in metadata files or in a .txt beside each image.

`metadata.jsonl` and `metadata.csv` (of any subfolder, whose `file_name` counts from there) are what the `datasets`
library reads as an imagefolder. A .txt beside an image counts more than a line of metadata.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from hgdpo_core.errors import InputError
from hgdpo_core.image_sets.trees import local_tree
from hgdpo_core.images import IMAGE_SUFFIXES
from hgdpo_core.storage import PARALLEL_REQUESTS, Store, is_temporary
from hgdpo_core.storage.text_files import csv_rows, decode_text, parse_json

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
    store, files = Store(str(root)), _files(root)
    names = select_images(files)
    if not names:
        raise _no_image(folder)
    captions, problems = read_captions(store, names, files)
    missing = [name for name in names if name not in captions]
    if problems:
        raise InputError(f"images: the caption of {root / min(problems)} cannot be read: {problems[min(problems)]}")
    if missing:
        raise InputError(f"images: {len(missing)} of {len(names)} images have no caption, the first is "
                         f"{root / missing[0]}: add a line to metadata.jsonl or a .txt file of the same name")
    return [CaptionedImage(root / name, captions[name]) for name in names]


def find_images(folder: Path) -> list[Path]:
    """Every image file below a local folder, in name order; InputError when there is none."""
    names = select_images(_files(folder))
    if not names:
        raise _no_image(str(folder))
    return [folder / name for name in names]


def _files(folder: Path) -> list[str]:
    return [name for name, *_ in local_tree(folder)[0]]


def _no_image(place: str) -> InputError:
    return InputError(f"images: {place} holds no image ({', '.join(IMAGE_SUFFIXES)})")


def select_images(files: Iterable[str]) -> list[str]:
    """The images among relative paths, folder by folder in name order."""
    images = [name for name in files if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not is_temporary(name)
              and not PurePosixPath(name).name.startswith("._")]
    return sorted(images, key=lambda name: name.split("/"))


def caption_file(image: str) -> str:
    """Where the caption of an image lies that has a file of its own."""
    return str(PurePosixPath(image).with_suffix(".txt"))


def read_captions(store: Store, images: Sequence[str],
                  files: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Captions of those `images` (keys of `store`) that have one, read from the metadata and text files of `files`,
    and why the text file of an image cannot be read.
    """
    known, wanted = set(files), set(images)
    captions: dict[str, str] = {}
    metadata = [name for name in known if PurePosixPath(name).name in METADATA]
    for key in sorted(metadata, key=lambda name: (-name.count("/"), name)):  # the folder's own word comes last
        folder = key.rpartition("/")[0]
        for name, caption in _metadata(store, key):
            image = f"{folder}/{name}" if folder else name
            if image in wanted:
                captions[image] = caption
    texts = {text for name in images if (text := caption_file(name)) in known}
    beside: dict[str, str] = {}
    problems: dict[str, str] = {}
    for keys in _groups(sorted(texts), 32 * PARALLEL_REQUESTS):
        for key, data in store.read_many(keys).items():
            try:
                beside[key] = decode_text(data, PurePosixPath(key).name).strip()
            except InputError as error:
                problems[key] = str(error)
    captions = captions | {name: beside[text] for name in images if (text := caption_file(name)) in beside}
    unreadable = {name: problems[text] for name in images if (text := caption_file(name)) in problems}
    return {name: text for name, text in captions.items() if name not in unreadable}, unreadable


def _groups(items: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(items), size):
        yield items[start:start + size]


def _metadata(store: Store, key: str) -> Iterator[tuple[str, str]]:
    """(file name, caption) of every line that has both; null and missing captions are left out."""
    url = store.url(key).removeprefix("file://")
    text = decode_text(store.read_bytes(key), url)
    rows = _json_lines(text, url) if key.endswith(".jsonl") else _csv_lines(text, url)
    for number, row in rows:
        name, caption = row.get("file_name"), caption_of(row)
        column = any(column in row for column in CAPTION_COLUMNS)
        if not isinstance(name, str) or not column or not isinstance(caption, str | None):
            raise InputError(f'line {number} of {url} is not {{"file_name": …, "text": …}}')
        if caption is not None:
            yield name.removeprefix("./"), caption


def _json_lines(text: str, url: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f'line {number} of {url} is not {{"file_name": …, "text": …}}')
        yield number, row


def _csv_lines(text: str, url: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in csv_rows(text, url):
        if "file_name" not in row or not set(row) & set(CAPTION_COLUMNS):
            raise InputError(f"{url} has no columns file_name and {' or '.join(CAPTION_COLUMNS)}: it has "
                             f"{', '.join(row) or 'none'}")
        yield number, row


def caption_of(row: Mapping[str, Any]) -> Any:
    """The caption in a row of somebody's table, whatever its column is called; None where there is none."""
    return next((row[column] for column in CAPTION_COLUMNS if row.get(column) is not None), None)


class FolderReader:
    """The bytes of images that are files."""

    def __init__(self, store: Store):
        self._store = store

    def read(self, rows: pa.Table) -> Iterator[bytes | str]:
        """Of each row the bytes, or why there are none."""
        for names in _groups(rows["name"].to_pylist(), PARALLEL_REQUESTS):
            found = self._store.read_many(names)
            yield from (found.get(name, "it is no longer there") for name in names)

    def close(self) -> None:
        """Nothing is kept open."""
