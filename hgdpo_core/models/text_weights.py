"""A text encoder's weights and length as older tools left them, corrected as every other tool does it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from transformers import CLIPTextModel

from hgdpo_core.models.weight_files import FLAT_TEXT_FIRST, TEXT, load_safetensors, open_torch, read_tensor_infos


def read_flat_text_encoder(path: Path, configs: str, dtype: torch.dtype) -> dict[str, CLIPTextModel]:
    """The `text_encoder` of a single file whose names lack `text_model.`, as old anime models and their merges have it.

    {} for any other file, whose text encoder diffusers reads itself.
    """
    if FLAT_TEXT_FIRST not in read_tensor_infos(path):
        return {}
    given = load_safetensors(path, TEXT)[0] if path.suffix == ".safetensors" else open_torch(path, mmap=True)
    renamed = {f"{TEXT}text_model.{name.removeprefix(TEXT)}": tensor for name, tensor in given.items()
               if name.startswith(TEXT)}
    return {"text_encoder": create_diffusers_clip_model_from_ldm(
        CLIPTextModel, renamed, subfolder="text_encoder", config=configs, torch_dtype=dtype, local_files_only=True)}


def use_encoder_length(pipeline: StableDiffusionPipeline, text_parts: Mapping[str, str]) -> None:
    """Let each tokenizer cut texts at the length that its text encoder reads; some folders leave it out."""
    parts = cast(Any, pipeline).components
    for encoder, tokenizer in text_parts.items():
        longest = parts[encoder].config.max_position_embeddings
        parts[tokenizer].model_max_length = min(parts[tokenizer].model_max_length, longest)
