"""Encoded images to pixels and back."""

import contextlib
import functools
import io
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hgdpo_core.config import ImageFormat
from hgdpo_core.errors import InputError
from hgdpo_core.images.colours import is_converted, to_srgb

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".jpe", ".jfif", ".avif", ".tif", ".tiff", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "AVIF", "TIFF", "GIF")
"""What is opened, whatever a file is called: for PostScript Pillow would start Ghostscript."""


def encode_image(pixels: np.ndarray, image_format: ImageFormat) -> bytes:
    """uint8 [H, W, 3] as bytes. PNG and WebP are lossless; JPEG is quality 95."""
    buffer = io.BytesIO()
    options = {"png": {"compress_level": 1}, "webp": {"lossless": True}, "jpeg": {"quality": 95, "subsampling": 0}}
    Image.fromarray(pixels).save(buffer, format=image_format.upper(), **options[image_format])
    return buffer.getvalue()


def any_converted(files: Iterable[Path]) -> bool:
    """Whether an image of some local files has a profile or transparency; read are headers, up to the first."""
    for file in files:
        with contextlib.suppress(Exception), file.open("rb") as data:  # broken ones have no pixels
            if is_converted(open_image(data)):
                return True
    return False


def open_image(file: BinaryIO) -> Image.Image:
    """An image of FORMATS of which the header is read; Pillow's errors for any other file."""
    return Image.open(file, formats=_installed_formats())


@functools.cache
def _installed_formats() -> tuple[str, ...]:
    Image.init()  # a Pillow may be built without a codec
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode_image(data: bytes) -> Image.Image:
    """RGB image of encoded bytes, turned as its EXIF says; InputError when they do not decode.

    Profiles are turned into sRGB, transparency is laid on white, 16 bits are scaled to 8. An image of more pixels than
    Pillow takes for harmless (179 million) is refused before it is unpacked.
    """
    try:
        return to_srgb(ImageOps.exif_transpose(open_image(io.BytesIO(data))))
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError:  # its message is an address in memory
        raise InputError(f"{len(data)} bytes do not decode as an image: expected {', '.join(FORMATS)}") from None
    except Exception as error:  # broken bytes: every codec has its own family of errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{len(data)} bytes do not decode as an image: {reason}") from None


def fit_image(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale to cover `width` x `height` keeping the aspect, then cut the middle out."""
    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)


def to_model_range(image: Image.Image) -> np.ndarray:
    """float32 [3, H, W] in [-1, 1], what a VAE encodes."""
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0
