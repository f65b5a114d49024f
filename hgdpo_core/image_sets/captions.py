"""Captions for the images of a folder that have none: a .txt beside each, at once, so that a stop loses one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
from PIL import Image

from hgdpo_core.errors import InputError, StoppedError
from hgdpo_core.image_sets.folders import FolderReader, caption_file, read_captions, select_images
from hgdpo_core.image_sets.sets import list_files
from hgdpo_core.images import decode_image
from hgdpo_core.parallel import thread_map
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.storage import Store

Describe = Callable[[Sequence[Image.Image]], list[str]]
"""RGB images in, a caption of each out; "" for none."""


@dataclass(frozen=True)
class Uncaptioned:
    """The images of a folder that have no caption, or only an empty one."""

    store: Store
    names: tuple[str, ...]
    images: int
    """Of the whole folder."""


@dataclass
class Captioned:
    """The result of `write_captions`."""

    written: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    """Image -> why it still has no caption."""


def find_uncaptioned(folder: str) -> Uncaptioned:
    """The images below a folder, path or URL, without a caption; InputError when there is no image at all."""
    store, files, _ = list_files(folder)
    keys = [file.key for file in files]
    names = select_images(keys)
    if not names:
        raise InputError(f"images: {folder} holds no image files, beside which captions are written: unpack .tar and "
                         ".parquet files into a folder first")
    captions, problems = read_captions(store, names, keys)
    if problems:
        raise InputError(f"images: the caption of {min(problems)} cannot be read, and is not overwritten: "
                         f"{problems[min(problems)]}")
    missing = tuple(name for name in names if not captions.get(name, "").strip())
    return Uncaptioned(store, missing, len(names))


def write_captions(images: Uncaptioned, describe: Describe, *, batch_size: int = 8, progress: Progress = silent,
                   should_stop: ShouldStop = never_stop) -> Captioned:
    """Describe the images in batches and write each batch's captions. An existing caption is never overwritten.

    StoppedError after `should_stop`; a new start continues after the last batch.
    """
    result, reader = Captioned(), FolderReader(images.store)
    for start in range(0, len(images.names), batch_size):
        if should_stop():
            raise StoppedError(f"stopped after {start} of {len(images.names)} images; captions written so far are kept")
        names = images.names[start:start + batch_size]
        opened = _open(reader, names, result)
        for name, caption in zip(opened, describe(list(opened.values())) if opened else [], strict=True):
            _write(images.store, name, caption, result)
        progress(start + len(names), len(images.names), "images")
    return result


def _open(reader: FolderReader, names: Sequence[str], result: Captioned) -> dict[str, Image.Image]:
    rows = pa.table({"name": list(names)})
    opened: dict[str, Image.Image] = {}
    for name, image in zip(names, thread_map(_decode, reader.read(rows)), strict=True):
        if isinstance(image, str):
            result.problems[name] = image
        else:
            opened[name] = image
    return opened


def _decode(data: bytes | str) -> Image.Image | str:
    """The image, or why there is none."""
    try:
        return data if isinstance(data, str) else decode_image(data)
    except InputError as error:
        return str(error)


def _write(store: Store, name: str, caption: str, result: Captioned) -> None:
    key = caption_file(name)
    if not caption.strip():
        result.problems[name] = "the model gave no caption"
    elif not (store.exists(key) and store.read_bytes(key).strip()):  # another process may have written one meanwhile
        store.write_bytes(key, f"{caption}\n".encode())
        result.written += 1
