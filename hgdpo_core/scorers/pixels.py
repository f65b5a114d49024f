"""From images to the pixels a scorer sees, with PIL and torch alone. Each rule equals its original's torchvision.

Every scorer sees what a viewer shows: EXIF rotation and colour profiles are applied, transparency is laid on white,
grey and palette become RGB. So a score belongs to the image, not to its file's mode. The originals agree
on opaque images without an EXIF rotation; they handle no others.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from hgdpo_core.errors import InputError
from hgdpo_core.images.colours import to_srgb
from hgdpo_core.parallel import threads

Images = Sequence[Image.Image] | np.ndarray | torch.Tensor


class Prepared(NamedTuple):
    """What a scorer's network sees of one image, made ahead: a list of them stands for the images."""

    pixels: np.ndarray


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def to_rgb_images(images: Images) -> list[Image.Image]:
    """RGB images of PIL images of any mode and size, or of uint8 [B, H, W, 3] (numpy or torch)."""
    if isinstance(images, np.ndarray | torch.Tensor):
        array = images.cpu().numpy() if isinstance(images, torch.Tensor) else images
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
            raise InputError(f"images: expected PIL images or uint8 [B, H, W, 3], got {array.dtype} "
                             f"{list(array.shape)}: multiply by 255 and move the colours last")
        return [Image.fromarray(image) for image in array]
    return [to_srgb(ImageOps.exif_transpose(image)) for image in images]


def check_counts(images: Images, prompts: Sequence[str]) -> None:
    """InputError unless there is one prompt per image."""
    if len(images) != len(prompts):
        raise InputError(f"expected one prompt an image, got {len(images)} images and {len(prompts)} prompts")


def map_images(function: Callable[[Image.Image], np.ndarray], images: Images) -> torch.Tensor:
    """`function` of each image, stacked; in threads, because PIL and numpy release the interpreter lock meanwhile.

    Images that are `Prepared` are stacked as they are.
    """
    prepared = [image.pixels for image in images if isinstance(image, Prepared)]
    if prepared:
        if len(prepared) != len(images):
            raise InputError(f"{len(prepared)} of {len(images)} images are prepared: expected all or none")
        return torch.from_numpy(np.stack(prepared))
    given = to_rgb_images(images)
    arrays = list(threads().map(function, given)) if len(given) > 1 else [function(image) for image in given]
    return torch.from_numpy(np.stack(arrays))


def round_half(rest: int) -> int:
    """torchvision's half of a number of pixels: halves go to the even neighbour, 1 -> 0 and 3 -> 2."""
    return round(rest / 2)


def floor_half(rest: int) -> int:
    """transformers' half: 1 -> 0 and 3 -> 1."""
    return rest // 2


def crop_pixels(images: Images, size: int, *, halve: Callable[[int], int] = round_half) -> torch.Tensor:
    """uint8 [B, 3, size, size]: shorter side to `size`, middle cut out, as OpenAI CLIP and ImageReward see an image.

    `halve` decides where the middle is when the rest is odd; the default is torchvision's rule.
    """
    return map_images(partial(_resize_and_crop, size=size, halve=halve), images)


def letterbox_pixels(images: Images, size: int, *, antialias: bool) -> torch.Tensor:
    """float32 [B, 3, size, size] in 0..1 as HPS v2 sees it: the whole image, longer side to `size`, black around."""
    return map_images(partial(_letterbox, size=size, antialias=antialias), images)


def normalise_pixels(pixels: torch.Tensor, dtype: torch.dtype, *, mean: Sequence[float] = CLIP_MEAN,
                     deviation: Sequence[float] = CLIP_STD) -> torch.Tensor:
    """uint8 or float32 in 0..1, shifted and scaled by a mean and a deviation per colour in float32, then cast."""
    scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    centre, spread = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, deviation))
    return ((scaled - centre) / spread).to(dtype)


def crop_tensor(pixels: torch.Tensor, size: int, *, halve: Callable[[int], int] = round_half) -> torch.Tensor:
    """`crop_pixels` of a tensor [B, 3, H, W] in 0..1, with its gradient; within 2/255 of what PIL gives.

    Columns, then rows, and clipped after each, as PIL does: bicubic overshoots. PIL also rounds to 8 bits after each,
    which has no gradient. Without antialias the difference would be up to 94/255.
    """
    height, width = _resized(pixels.shape[2], pixels.shape[3], size)
    for side in ((pixels.shape[2], width), (height, width)):
        if pixels.shape[2:] != side:
            pixels = torch.nn.functional.interpolate(pixels, size=side, mode="bicubic", align_corners=False,
                                                     antialias=True).clamp(0, 1)
    top, left = halve(height - size), halve(width - size)
    return pixels[..., top:top + size, left:left + size]


def _resized(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the shorter side at `size`."""
    other = int(size * max(height, width) / min(height, width))
    return (size, other) if height < width else (other, size)


def _resize_and_crop(image: Image.Image, size: int, halve: Callable[[int], int]) -> np.ndarray:
    height, width = _resized(image.height, image.width, size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = halve(width - size), halve(height - size)
    return np.asarray(resized.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def _letterbox(image: Image.Image, size: int, antialias: bool) -> np.ndarray:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    scale = size / max(image.size)
    height, width = (max(1, round(side * scale)) for side in (image.height, image.width))
    if scale != 1:
        pixels = torch.nn.functional.interpolate(pixels, size=(height, width), mode="bicubic", align_corners=False,
                                                 antialias=antialias)
    below, right = size - height, size - width
    padding = (right // 2, right - right // 2, below // 2, below - below // 2)
    return torch.nn.functional.pad(pixels / 255, padding)[0].numpy()
