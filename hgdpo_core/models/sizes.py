"""How large a model is, read from the headers of its files, without loading it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgdpo_core.models.lora import ATTENTION_LINEARS
from hgdpo_core.models.weight_files import TEXT_ENCODER, UNET, VAE, TensorInfo, read_header

FLOAT_BYTES = 4


@dataclass(frozen=True)
class ModelSize:
    """Numbers of a Stable Diffusion model. The defaults are SD 1.5's, for what a folder does not state."""

    denoiser: int = 860_000_000
    codec: int = 84_000_000
    text: int = 123_000_000
    attention: int = 1_000_000      # inputs and outputs of attention's linear layers, summed: a LoRA's size per rank
    latent_channels: int = 4
    scale_factor: int = 8
    text_numbers: int = 77 * 768    # of one prompt's embedding

    @property
    def whole(self) -> int:
        """All of them."""
        return self.denoiser + self.codec + self.text

    def latent_bytes(self, size: tuple[int, int], images: int) -> int:
        """Of the latents of `images` images of (width, height) pixels and one prompt's embedding."""
        pixels = (size[0] // self.scale_factor) * (size[1] // self.scale_factor)
        return FLOAT_BYTES * (images * self.latent_channels * pixels + self.text_numbers)


def model_size(path: Path) -> ModelSize:
    """Of a diffusers folder or a single .safetensors file, without loading it; SD 1.5's for other files."""
    known: dict[str, Any] = {}
    if path.is_file() and path.suffix != ".safetensors":
        return ModelSize()
    if path.is_file():
        tensors = read_header(path)
        parts = {"denoiser": UNET, "codec": VAE, "text": (TEXT_ENCODER, "conditioner.")}
        found = {part: {name: info for name, info in tensors.items() if name.startswith(prefix)}
                 for part, prefix in parts.items()}
    else:
        folders = {"denoiser": ["unet"], "codec": ["vae"], "text": ["text_encoder", "text_encoder_2"]}
        found = {part: {f"{folder}.{name}": info for folder in names for name, info in _tensors(path / folder).items()}
                 for part, names in folders.items()}
        known = _from_configs(path)
    known |= {part: sum(math.prod(info.shape) for info in tensors.values()) for part, tensors in found.items()
              if tensors}
    attention = [info.shape for name, info in found["denoiser"].items()
                 if name.endswith(tuple(f".{layer}.weight" for layer in ATTENTION_LINEARS))]
    if attention:
        known["attention"] = sum(map(sum, attention))
    return ModelSize(**known)


def _from_configs(folder: Path) -> dict[str, Any]:
    vae, text = _json(folder / "vae/config.json"), _json(folder / "text_encoder/config.json")
    known: dict[str, Any] = {}
    if "latent_channels" in vae and "block_out_channels" in vae:
        known |= {"latent_channels": vae["latent_channels"], "scale_factor": 2 ** (len(vae["block_out_channels"]) - 1)}
    second = _json(folder / "text_encoder_2/config.json")  # of SDXL
    if "hidden_size" in text and "max_position_embeddings" in text:
        width = text["hidden_size"] + second.get("hidden_size", 0)
        known["text_numbers"] = text["max_position_embeddings"] * width + second.get("projection_dim", 0)
    return known


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.is_file() else {}


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a component by name; a name in two files (two precisions of one model) counts once."""
    return {name: info for file in sorted(folder.glob("*.safetensors")) for name, info in read_header(file).items()}
