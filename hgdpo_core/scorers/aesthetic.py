"""LAION's aesthetic predictor, sac+logos+ava1-l14-linearMSE: a linear head over OpenAI CLIP ViT-L/14's image embedding.

It rates the image alone; a prompt changes nothing. https://github.com/christophschuhmann/improved-aesthetic-predictor
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import torch
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from hgdpo_core.devices import Float32, in_own_float32
from hgdpo_core.errors import ModelError, first_line
from hgdpo_core.scorers import towers, weights
from hgdpo_core.scorers.heads import linear_head
from hgdpo_core.scorers.pixels import Images, Prepared, check_counts, crop_pixels, normalise_pixels
from hgdpo_core.storage.local import write_atomically
from hgdpo_core.storage.scratch import cache_folder

NAME, TITLE = "aesthetic", "LAION aesthetic"
STEM = "sac+logos+ava1-l14-linearMSE"
NAMES = (f"{STEM}.safetensors", f"{STEM}.pth")
ADDRESS = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
HEAD_URL = f"{ADDRESS}/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


class Aesthetic:
    """A loaded aesthetic predictor."""

    name = NAME
    float32: Float32 = "ieee"

    def __init__(self, vision: Any, head: torch.nn.Module, fingerprint: str):
        self.vision, self.head, self.fingerprint = vision, head, fingerprint

    def prepare(self, image: Image.Image) -> Prepared:
        """What the vision tower sees of an image, before it is normalised."""
        return Prepared(crop_pixels([image], self.vision.config.image_size)[0].numpy())

    @torch.no_grad()
    @in_own_float32
    def score(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        """Ratings of about 1 to 10, float32 [B] on the CPU. Prompts are counted, not read."""
        check_counts(images, prompts)
        return self.head(self.embed_images(images))[:, 0].cpu()

    @torch.no_grad()
    @in_own_float32
    def embed_images(self, images: Images) -> torch.Tensor:
        """L2-normalised float32 [B, D]."""
        pixels = crop_pixels(images, self.vision.config.image_size).to(self.vision.device)
        return towers.normalise(self.vision(pixel_values=normalise_pixels(pixels, self.vision.dtype)).image_embeds)


def locate(source: str | None) -> tuple[Path, Path, str]:
    """The head's file, the folder of its CLIP (a transformers CLIPModel), the fingerprint.

    The CLIP is the one beside the head, if there is one, else OpenAI's from the hub.
    """
    head = public_head() if source is None else weights.find_weights(source, NAMES, ADDRESS)
    clip = weights.find_files("its CLIP", source, head, towers.MODEL_FILES, towers.OPENAI_CLIP)
    return head, clip[0].parent, weights.fingerprint(NAME, [head, *clip])


def check(source: str | None) -> None:
    """ModelError where headers show that head or CLIP is not whole, or that they do not fit; no network is loaded."""
    path, folder, _ = locate(source)
    head = linear_head(path, weights.read_empty_tensors(path), "layers.")
    vision: Any = towers.check_folder(folder, CLIPVisionModelWithProjection).vision_config
    _check_width(head, folder, vision.projection_dim)


def _check_width(head: torch.nn.Module, folder: Path, width: int) -> None:
    expected = next(head.parameters()).shape[1]
    if width != expected:
        raise ModelError(f"the head reads {expected} numbers, the CLIP in {folder} gives {width}: put the head beside "
                         f"{towers.OPENAI_CLIP}")


def load(*, source: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Aesthetic:
    """The published head (None), or one from a folder or file; CLIP runs in `dtype`, the head in float32."""
    path, folder, fingerprint = locate(source)
    head = linear_head(path, weights.read_tensors(path), "layers.")
    vision = towers.load_folder(folder, dtype, CLIPVisionModelWithProjection)
    _check_width(head, folder, vision.config.projection_dim)
    return Aesthetic(weights.freeze(vision, device), weights.freeze(head, device), fingerprint)


def public_head() -> Path:
    """The published head, fetched once into the cache and checked by its sha256."""
    cache = cache_folder("scorers")
    found = weights.first_of(cache, NAMES)
    if found:
        return found
    try:
        with fsspec.open(HEAD_URL, "rb") as file:
            data: bytes = file.read()  # type: ignore[union-attr]
    except Exception as error:  # aiohttp raises a wide family: all mean "could not be downloaded"
        raise ModelError(f"{HEAD_URL} could not be downloaded ({first_line(error)}): put that file into {cache}, or "
                         f"beside the files of {towers.OPENAI_CLIP} and give that folder as the scorer's "
                         "source") from None
    if hashlib.sha256(data).hexdigest() != HEAD_SHA256:
        raise ModelError(f"{HEAD_URL} gave {len(data)} bytes that are not the published head: try again, or put the "
                         f"right file into {cache}")
    write_atomically(cache / NAMES[-1], lambda file: file.write(data))
    return cache / NAMES[-1]
