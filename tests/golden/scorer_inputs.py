"""What the originals and our scorers are both given: images, prompts, random weights. Needs numpy and PIL only.

Made with integers and numpy's frozen RandomState, so that every version of numpy and PIL makes the same; the golden
file holds the images' sha256 to prove it.
"""

import hashlib
import zlib

import numpy as np
from PIL import Image, ImageDraw

SIZES = [(704, 1024), (511, 333), (161, 301), (640, 427), (1023, 767), (225, 226), (300, 61), (64, 64)]
"""Width and height in pixels: portrait, landscape, odd, nearly square, long, small.

None is over twice as tall as wide: Pillow 13 shrinks such images height first, Pillow 12 width first, which moves a
fifth of the pixels by one level of 255, in the originals as in ours.
"""
PROMPTS = [
    "a woman in a red top, waving, on the beach",
    "a train conductor\u2019s hat \u2013 \u201cphoto\u201d  of   a man\u2026",
    "portrait of a girl &amp; her dog, 35mm",
    "Beyonc\u00e9 smiling, caf\u00e9 \ufb01lm still",
    "two people walking",
    "a very long prompt, " + "with many words that go on and on, " * 30,
    "",
    "a boy runs 100 m in 9.58 s (world record!)",
]


def make_images() -> list[Image.Image]:
    """Photograph-like images: soft light, hard edges, fine grain. The third is grey, the fourth opaque RGBA."""
    images = [_make_image(number, size) for number, size in enumerate(SIZES)]
    images[2], images[3] = images[2].convert("L"), images[3].convert("RGBA")
    return images


def _make_image(number: int, size: tuple[int, int]) -> Image.Image:
    random = np.random.RandomState(number)
    width, height = size
    soft = Image.fromarray(random.randint(0, 256, (5, 4, 3)).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(soft)
    for _ in range(12):
        left, top = int(random.randint(0, width)), int(random.randint(0, height))
        box = (left, top, left + 1 + int(random.randint(0, width // 3)), top + 1 + int(random.randint(0, height // 3)))
        draw.rectangle(box, fill=tuple(int(value) for value in random.randint(0, 256, 3)))
    grain = random.randint(-12, 13, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(soft).astype(np.int64) + grain, 0, 255).astype(np.uint8))


def image_hash(image: Image.Image) -> str:
    """sha256 of the pixels."""
    return hashlib.sha256(image.tobytes()).hexdigest()


def make_weights(shapes: dict[str, list[int]], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 arrays by name, each from its own seed, rounded to float16 (OpenAI's loader casts to it)."""
    return {name: _make_weight(name, shape, seed) for name, shape in shapes.items()}


def _make_weight(name: str, shape: list[int], seed: int) -> np.ndarray:
    if name.endswith("logit_scale"):
        return np.full(shape, 4.6, dtype=np.float32)
    values = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode())).standard_normal(shape)
    is_norm = any(part in name.lower() for part in ("ln_", "layernorm", "norm"))
    if len(shape) == 1 and is_norm and name.endswith("weight"):
        values = 1 + 0.2 * values
    elif "embed" in name and "patch" not in name or "cls_token" in name:
        values = 0.5 * values
    elif len(shape) == 1:
        values = 0.1 * values
    else:
        values = values / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float16).astype(np.float32)
