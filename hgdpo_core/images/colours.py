"""Any image as the sRGB pixels that a viewer shows: profiles applied, transparency over white, 16 bits scaled to 8."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

from hgdpo_core.errors import InputError

GROUND = (255, 255, 255)
"""What shows through transparent pixels."""
SAME_WITHIN = 2
_SRGB = ImageCms.createProfile("sRGB")
_STEPS = np.linspace(0, 255, 6).astype(np.uint8)


def to_srgb(image: Image.Image) -> Image.Image:
    """RGB, without a profile; InputError for pixels of 32 bits, whose white is not known.

    A profile that cannot be read is passed over, as viewers do.
    """
    profile = image.info.get("icc_profile")
    image = _to_eight_bits(image)
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        colours, alpha = layered.convert("RGB"), layered.getchannel("A")
        result = Image.new("RGB", image.size, GROUND)
        result.paste(_apply_profile(colours, profile), mask=alpha)
    else:
        direct = image.mode in ("L", "RGB", "CMYK")
        result = _apply_profile(image if direct else image.convert("RGB"), profile).convert("RGB")
    result.info.pop("icc_profile", None)  # or it would be applied again
    return result


def is_converted(image: Image.Image) -> bool:
    """Whether an image, of which only the header need be read, has transparency or colours of another space."""
    profile = image.info.get("icc_profile")
    return image.has_transparency_data or bool(profile and _transform(profile, image.mode))


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    transform = _transform(profile, image.mode) if profile else None
    return image if transform is None else ImageCms.applyTransform(image, transform) or image


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where it is sRGB itself, for another mode or broken."""
    mode = mode if mode in ("L", "CMYK") else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, _SRGB, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "RGB":
        cube = np.stack(np.meshgrid(_STEPS, _STEPS, _STEPS), axis=-1).reshape(1, -1, 3)
        shown = ImageCms.applyTransform(Image.fromarray(cube), transform)
        if shown is not None and np.abs(np.asarray(shown).astype(int) - cube).max() <= SAME_WITHIN:
            return None
    return transform


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Pillow itself would cut 16 bits off at 255, which turns an image white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError("its pixels have 32 bits, whose white is not stated: save it with 8 or 16 bits a colour")
    return image
