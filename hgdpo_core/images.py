"""Images at the edges: encoded bytes to pixels and back, and the user's own image folders."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hgdpo_core.config import ImageFormat
from hgdpo_core.errors import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def encode_image(pixels: np.ndarray, image_format: ImageFormat) -> bytes:
    """uint8 [H, W, 3] as bytes. PNG and WebP are lossless; JPEG is quality 95."""
    buffer = io.BytesIO()
    options = {"png": {"compress_level": 1}, "webp": {"lossless": True}, "jpeg": {"quality": 95, "subsampling": 0}}
    Image.fromarray(pixels).save(buffer, format=image_format.upper(), **options[image_format])
    return buffer.getvalue()


def decode_image(data: bytes) -> Image.Image:
    """RGB image of encoded bytes, turned as its EXIF says; InputError when they do not decode."""
    try:
        image = Image.open(io.BytesIO(data))
        return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{len(data)} bytes do not decode as an image: {error}") from None


def fit_image(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale to cover `width` x `height` keeping the aspect, then cut the middle out."""
    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)


def to_model_range(image: Image.Image) -> np.ndarray:
    """float32 [3, H, W] in [-1, 1], what a VAE encodes."""
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0


@dataclass(frozen=True)
class CaptionedImage:
    """One file of the user's folder with its text."""

    path: Path
    caption: str


def find_captioned_images(folder: str) -> list[CaptionedImage]:
    """Images of a folder that has `metadata.jsonl` (file_name, text) or a .txt beside each image, in name order.

    InputError when the folder is missing, empty, or an image has no caption. Files are not opened here.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"images: {folder} is not a folder; expected images with metadata.jsonl or .txt captions")
    files = find_images(root)
    captions = dict(_captions(root, files))
    missing = [path for path in files if path not in captions]
    if missing:
        raise InputError(f"images: {len(missing)} of {len(files)} images have no caption, the first is {missing[0]}: "
                         "add a line to metadata.jsonl or a .txt file of the same name")
    return [CaptionedImage(path, captions[path]) for path in files]


def find_images(folder: Path) -> list[Path]:
    """Every image file below a folder, in name order; InputError when there is none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"images: {folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return files


def _captions(root: Path, files: list[Path]) -> Iterator[tuple[Path, str]]:
    metadata = root / "metadata.jsonl"
    if metadata.exists():
        for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                yield root / row["file_name"], row["text"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise InputError(f'line {number} of {metadata} is not {{"file_name": …, "text": …}}') from None
    for path in files:
        text = path.with_suffix(".txt")
        if text.exists():
            yield path, text.read_text(encoding="utf-8").strip()
