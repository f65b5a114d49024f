"""Weight files, judged before anything is loaded: whole or cut off, which precision, which model family."""

import json
import math
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import torch

from hgdpo_core.errors import ModelError

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
TORCH_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

UNET, VAE, TEXT_ENCODER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
UNET_FIRST = UNET + "input_blocks.0.0.weight"
UNET_TEXT = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
TEXT_FIRST = TEXT_ENCODER + "transformer.text_model.embeddings.position_embedding.weight"
# Keys that only one family of single files has. SD 2's text encoder is OpenCLIP's.
OTHER_FAMILIES = {"conditioner.embedders.": "Stable Diffusion XL", TEXT_ENCODER + "model.": "Stable Diffusion 2",
                  UNET + "joint_blocks.": "Stable Diffusion 3", UNET + "double_blocks.": "Flux",
                  "joint_blocks.": "Stable Diffusion 3", "double_blocks.": "Flux"}
TEXT_WIDTHS = {1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
INPUT_CHANNELS = {9: "an inpainting model", 8: "an image-editing model"}


class TensorInfo(NamedTuple):
    """What a header says of a tensor; a float's dtype in safetensors' words (F32, BF16, ...)."""

    dtype: str
    shape: tuple[int, ...]


def read_tensor_infos(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of a weight file's tensors, without its data. ModelError, in one line, if it is broken.

    A `.ckpt` is opened as `torch.load(weights_only=True)` allows, or not at all; its tensors stay on the disk where
    the file's format permits it.
    """
    if path.suffix == ".safetensors":
        infos = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        infos = _read_torch(path)
    else:
        raise ModelError(f"{path} is no weight file: expected {', '.join(WEIGHT_SUFFIXES)}, or a diffusers folder")
    wrong = next((name for name, info in infos.items()
                  if name.endswith("weight") and info.dtype not in FLOAT_DTYPES), None)
    if wrong is not None:
        raise ModelError(f"{path} holds {infos[wrong].dtype} weights ({wrong}): expected F32, F16 or BF16; "
                         "take the unquantised checkpoint")
    return infos


def _read_safetensors(path: Path) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version"):
            raise ModelError(f"{path} is a Git LFS pointer of {size} bytes, not the weights: run git lfs pull")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise ModelError(f"{path} has {size:,} bytes and no whole safetensors header: it is cut off or another "
                             "format; get it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            infos = {name: TensorInfo(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ModelError(f"{path} has a safetensors header that cannot be read: get the file again") from None
    if end != size:
        raise ModelError(f"{path} is {'cut off' if size < end else 'damaged'}: its header names {end:,} bytes, "
                         f"the file has {size:,}; get it again")
    if not infos:
        raise ModelError(f"{path} holds no tensors: get the file again")
    return infos


def _read_torch(path: Path) -> dict[str, TensorInfo]:
    convert = "convert it to .safetensors where you trust its origin (A1111's Checkpoint Merger saves it as such)"
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path) or None)
    except pickle.UnpicklingError:
        raise ModelError(f"{path} holds more than tensors, and running a stranger's pickle is unsafe: {convert}"
                         ) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError):
        raise ModelError(f"{path} cannot be read as a torch checkpoint, it is cut off or another format: get it again, "
                         f"or {convert}") from None
    while isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path} is no plain state dict of tensors: {convert}")
    return {str(name): TensorInfo(TORCH_DTYPES.get(value.dtype, str(value.dtype)), tuple(value.shape))
            for name, value in state.items() if isinstance(value, torch.Tensor)}


def check_single_file(path: Path, infos: Mapping[str, TensorInfo], *, own_vae: bool) -> None:
    """Refuse a single file that is not Stable Diffusion 1.x under its original key names.

    `own_vae`: the file's VAE will be used, so it must have one.
    """
    expected = "expected a whole checkpoint of the SD 1.5 family"
    for prefix, family in OTHER_FAMILIES.items():
        if any(name.startswith(prefix) for name in infos):
            raise ModelError(f"{path} is {family}: {expected}")
    if UNET_FIRST not in infos:
        raise ModelError(f"{path} holds no UNet under {UNET}: {expected}")
    channels, width = infos[UNET_FIRST].shape[1], infos[UNET_TEXT].shape[-1] if UNET_TEXT in infos else None
    if channels in INPUT_CHANNELS:
        raise ModelError(f"{path} is {INPUT_CHANNELS[channels]} (its UNet takes {channels} input channels): {expected}")
    if width in TEXT_WIDTHS:
        raise ModelError(f"{path} is {TEXT_WIDTHS[width]} (its UNet reads text {width} wide): {expected}")
    if TEXT_FIRST not in infos:
        raise ModelError(f"{path} holds no CLIP text encoder under {TEXT_ENCODER}transformer.text_model.: {expected}")
    if own_vae and not any(name.startswith(VAE) for name in infos):
        raise ModelError(f"{path} holds no VAE: set target.vae to one, for example stabilityai/sd-vae-ft-mse")


def check_vae_file(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse a single file that is no image VAE with a decoder and an encoder."""
    names = {name.removeprefix(VAE) for name in infos}
    if not {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= names:
        raise ModelError(f"target.vae {path} holds no VAE: expected a file with encoder.conv_in and decoder.conv_in, "
                         "a diffusers folder or a hub id")


def check_folder_weights(folder: Path) -> None:
    """Refuse a diffusers component folder whose safetensors are cut off, damaged or quantised."""
    for path in sorted(folder.glob("*.safetensors")):
        read_tensor_infos(path)


def check_finite(path: Path, components: Mapping[str, Any]) -> None:
    """ModelError naming the first weight of a loaded model that is NaN, infinite or was never in the file."""
    for part, module in components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        for name, tensor in module.state_dict().items():
            if tensor.is_meta:
                raise ModelError(f"{path} lacks {part}'s {name}: the file is incomplete, get a whole one")
            if tensor.is_floating_point() and not _is_finite(tensor):
                raise ModelError(f"{path} holds NaN or infinity in {part}'s {name} as {str(tensor.dtype)[6:]}: the "
                                 "checkpoint is broken (or, in float16, overflows: set target.dtype to float32)")


def check_text_encoder(folder: Path, text_encoder: torch.nn.Module) -> None:
    """ModelError where a diffusers folder lacks a weight of the text encoder: transformers makes up random ones."""
    files = sorted((folder / "text_encoder").glob("*.safetensors"))
    prefix = "text_model."  # older savers wrote it, newer ones do not
    given = {name.removeprefix(prefix) for file in files for name in read_tensor_infos(file)}
    lacking = [name for name in text_encoder.state_dict() if name.removeprefix(prefix) not in given]
    if files and lacking:
        raise ModelError(f"{folder} lacks text_encoder's {lacking[0]}: the file is incomplete, get a whole one")


def _is_finite(tensor: torch.Tensor) -> bool:
    """One pass without a temporary: a sum is finite when all is; the exact test decides where it is not."""
    return math.isfinite(tensor.sum(dtype=torch.float32)) or bool(torch.isfinite(tensor).all())
