"""Weight files, checked before anything is loaded: whole or cut off, which precision, which model family."""

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import torch
from safetensors import safe_open

from hgdpo_core.errors import ModelError, first_line

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
WRAPPERS = ("state_dict", "model")
"""Under which a training script keeps a model's tensors in its checkpoint."""
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
TORCH_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

UNET, VAE, TEXT_ENCODER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
TEXT = TEXT_ENCODER + "transformer."
UNET_FIRST = UNET + "input_blocks.0.0.weight"
UNET_TEXT = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
TEXT_FIRST = TEXT + "text_model.embeddings.position_embedding.weight"
FLAT_TEXT_FIRST = TEXT + "embeddings.position_embedding.weight"  # of old anime models and their merges
# Keys that only one family of single files has. SD 2's text encoder is OpenCLIP's.
OTHER_FAMILIES = {"conditioner.embedders.": "Stable Diffusion XL", TEXT_ENCODER + "model.": "Stable Diffusion 2",
                  UNET + "joint_blocks.": "Stable Diffusion 3", UNET + "double_blocks.": "Flux",
                  "joint_blocks.": "Stable Diffusion 3", "double_blocks.": "Flux"}
TEXT_WIDTHS = {1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
INPUT_CHANNELS = {9: "an inpainting model", 8: "an image-editing model"}


def read_config(path: Path) -> dict[str, Any]:
    """A component's JSON config; ModelError where it is missing or no JSON object."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: expected a folder saved by diffusers' save_pretrained") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}; get it again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object: get it again")
    return config


class TensorInfo(NamedTuple):
    """A tensor's entry in a header; a float's dtype in safetensors' words (F32, BF16, ...)."""

    dtype: str
    shape: tuple[int, ...]


def read_tensor_infos(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of a weight file's tensors, without its data. ModelError, in one line, if it is broken.

    A `.ckpt` is opened as `torch.load(weights_only=True)` allows, or not at all; its tensors stay on the disk where
    the file's format permits it.
    """
    if path.suffix == ".safetensors":
        infos = read_header(path)
    elif path.suffix in TORCH_SUFFIXES:
        infos = {name: TensorInfo(TORCH_DTYPES.get(value.dtype, str(value.dtype)), tuple(value.shape))
                 for name, value in open_torch(path, mmap=True).items()}
    else:
        raise ModelError(f"{path} is not a weight file: expected {', '.join(WEIGHT_SUFFIXES)}, or a diffusers folder")
    wrong = next((name for name, info in infos.items()
                  if name.endswith("weight") and info.dtype not in FLOAT_DTYPES), None)
    if wrong is not None:
        raise ModelError(f"{path} holds {infos[wrong].dtype} weights ({wrong}): expected F32, F16 or BF16; "
                         "take the unquantised checkpoint")
    return infos


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The header of a .safetensors file of any precision; ModelError, in one line, if it is broken."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
            header = file.read(length) if length and length <= min(MAX_HEADER_BYTES, size - 8) else b""
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}; get the file again") from None
    if start.startswith(b"version"):
        raise ModelError(f"{path} is a Git LFS pointer of {size} bytes, not the weights: run git lfs pull")
    if not header:
        raise ModelError(f"{path} has {size:,} bytes and no whole safetensors header: it is cut off or another "
                         "format; get it again")
    try:
        infos, end = _parse_header(header)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ModelError(f"{path} has a safetensors header that cannot be read: get the file again") from None
    end += 8 + len(header)
    if end != size:
        raise ModelError(f"{path} is {'cut off' if size < end else 'damaged'}: its header names {end:,} bytes, "
                         f"the file has {size:,}; get it again")
    if not infos:
        raise ModelError(f"{path} holds no tensors: get the file again")
    return infos


def _parse_header(header: bytes) -> tuple[dict[str, TensorInfo], int]:
    """The tensors, and where the last of them ends; ValueError and the like for what is not a header."""
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    infos = {name: TensorInfo(str(entry["dtype"]), tuple(entry["shape"])) for name, entry in entries.items()}
    ends = [entry["data_offsets"][1] for entry in entries.values()]
    if not all(isinstance(number, int) and number >= 0 for info in infos.values() for number in (*info.shape, *ends)):
        raise ValueError
    return infos, max(ends, default=0)


def load_safetensors(path: Path, prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors whose names begin with `prefix`, and the metadata of the file."""
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - safe_open is no mapping
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


CONVERT = "convert it to .safetensors where you trust its origin (A1111's Checkpoint Merger saves it as such)"


def open_torch(path: Path, *, mmap: bool = False, convert: str = CONVERT) -> dict[str, torch.Tensor]:
    """The tensors of a file that torch saved, unwrapped from a checkpoint, on the CPU; data is read, never code.

    With `mmap` they stay on the disk where the file's format permits it. ModelError, in one line, for what is not a
    plain state dict.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=(mmap and is_zipfile(path)) or None)
    except pickle.UnpicklingError:
        raise ModelError(f"{path} holds more than tensors, so the safe loader refuses it: {convert}") from None
    except Exception:  # what is not a checkpoint, or a damaged one, fails in any way
        raise ModelError(f"{path} cannot be read as a torch checkpoint, it is cut off or another format: get it again, "
                         f"or {convert}") from None
    for _ in range(4):  # a file may hold itself: without end it would be unwrapped for ever
        inner = [state[key] for key in WRAPPERS if isinstance(state, dict) and isinstance(state.get(key), dict)]
        state = inner[0] if inner else state
    tensors = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)
               } if isinstance(state, dict) else {}
    if not tensors:
        raise ModelError(f"{path} is not a plain state dict of tensors: {convert}")
    return tensors


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
    channels, width = (infos[name].shape[1] if name in infos and len(infos[name].shape) > 1 else None
                       for name in (UNET_FIRST, UNET_TEXT))
    if channels in INPUT_CHANNELS:
        raise ModelError(f"{path} is {INPUT_CHANNELS[channels]} (its UNet takes {channels} input channels): {expected}")
    if width in TEXT_WIDTHS:
        raise ModelError(f"{path} is {TEXT_WIDTHS[width]} (its UNet reads text {width} wide): {expected}")
    if not infos.keys() & {TEXT_FIRST, FLAT_TEXT_FIRST}:
        raise ModelError(f"{path} holds no CLIP text encoder under {TEXT}text_model.: {expected}")
    if own_vae and not any(name.startswith(VAE) for name in infos):
        raise ModelError(f"{path} holds no VAE: set target.vae to one, for example stabilityai/sd-vae-ft-mse")


def check_vae_file(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse a single file that is not an image VAE with a decoder and an encoder."""
    names = {name.removeprefix(VAE) for name in infos}
    if not {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= names:
        raise ModelError(f"target.vae {path} holds no VAE: expected a file with encoder.conv_in and decoder.conv_in, "
                         "a diffusers folder or a hub id")
