"""How large a model is, read from the headers of its files, without loading it."""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgdpo_core.models.lora import ATTENTION_LINEARS

FLOAT_BYTES = 4


@dataclass(frozen=True)
class ModelSize:
    """Numbers of a Stable Diffusion model. The defaults are SD 1.5's, for what a folder does not tell."""

    denoiser: int = 860_000_000
    codec: int = 84_000_000
    text: int = 123_000_000
    attention: int = 1_000_000      # inputs and outputs of all linear layers of attention, summed: a LoRA's size a rank
    latent_channels: int = 4
    scale_factor: int = 8
    text_numbers: int = 77 * 768    # of one prompt's embedding

    @property
    def whole(self) -> int:
        """All of them."""
        return self.denoiser + self.codec + self.text

    def latent_pixels(self, size: tuple[int, int]) -> int:
        """Of an image of (width, height) pixels."""
        return (size[0] // self.scale_factor) * (size[1] // self.scale_factor)

    def latent_bytes(self, size: tuple[int, int], images: int) -> int:
        """Of `images` latents and one prompt's embedding."""
        return FLOAT_BYTES * (images * self.latent_channels * self.latent_pixels(size) + self.text_numbers)


def model_size(path: Path) -> ModelSize:
    """Of a diffusers folder or a single .safetensors file, without loading it; SD 1.5's for other files."""
    known: dict[str, Any] = {}
    if path.is_file() and path.suffix != ".safetensors":
        return ModelSize()
    if path.is_file():
        tensors = _tensors([path])
        parts = {"denoiser": "model.diffusion_model.", "codec": "first_stage_model.", "text": "cond_stage_model."}
        found = {part: {name: shape for name, shape in tensors.items() if name.startswith(prefix)}
                 for part, prefix in parts.items()}
    else:
        folders = {"denoiser": "unet", "codec": "vae", "text": "text_encoder"}
        found = {part: _tensors(sorted((path / folder).glob("*.safetensors"))) for part, folder in folders.items()}
        known = _from_configs(path)
    known |= {part: _numbers(tensors) for part, tensors in found.items() if tensors}
    attention = [shape for name, shape in found["denoiser"].items()
                 if name.endswith(tuple(f".{layer}.weight" for layer in ATTENTION_LINEARS))]
    if attention:
        known["attention"] = sum(map(sum, attention))
    return ModelSize(**known)


def _from_configs(folder: Path) -> dict[str, Any]:
    vae, text = _json(folder / "vae/config.json"), _json(folder / "text_encoder/config.json")
    known: dict[str, Any] = {}
    if "latent_channels" in vae and "block_out_channels" in vae:
        known |= {"latent_channels": vae["latent_channels"], "scale_factor": 2 ** (len(vae["block_out_channels"]) - 1)}
    if "hidden_size" in text and "max_position_embeddings" in text:
        known["text_numbers"] = text["max_position_embeddings"] * text["hidden_size"]
    return known


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.is_file() else {}


def _tensors(files: Iterable[Path]) -> dict[str, list[int]]:
    """Name -> shape of every tensor; a name in two files (two precisions of one model) counts once."""
    shapes: dict[str, list[int]] = {}
    for file in files:
        with file.open("rb") as data:
            header = json.loads(data.read(struct.unpack("<Q", data.read(8))[0]))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return shapes


def _numbers(tensors: dict[str, list[int]]) -> int:
    return sum(math.prod(shape) for shape in tensors.values())
