"""LoRA files as people have them: checked to be whole, applied as a whole, or refused.

Libraries skip layers that they do not find in the model, drop a DoRA's magnitudes and leave a missing half
uninitialised; what was applied is therefore counted.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError

from hgdpo_core.errors import ModelError, first_line
from hgdpo_core.models.hub import quiet_transformers
from hgdpo_core.models.networks import is_finite
from hgdpo_core.models.weight_files import load_safetensors, read_tensor_infos

LORA_NAME = "pytorch_lora_weights.safetensors"
DOWN = ("lora_A", "lora_down", "lora.down", "lora_linear_layer.down")
UP = ("lora_B", "lora_up", "lora.up", "lora_linear_layer.up")
HALF = re.compile(rf"(?P<layer>.+?)[._](?P<side>{'|'.join(map(re.escape, DOWN + UP))})\.weight")
OTHER_KINDS = {"dora_scale": "a DoRA", "lora_magnitude_vector": "a DoRA", "hada_": "a LoHa", "lokr_": "a LoKr",
               "lora_mid": "a LoCon with a middle weight (CP decomposition)", "oft_": "an OFT", "on_input": "an (IA)3"}

Layers = dict[str, dict[str, str]]
"""Names of a layer's tensors by "down", "up" and "alpha"."""


def lora_file(path: Path) -> Path:
    """The weights of a LoRA that is a file, or a folder as diffusers saves it."""
    return path / LORA_NAME if path.is_dir() else path


def is_lora(path: Path) -> bool:
    """Whether a local path is a LoRA, and not a whole model, by its tensors' names; ModelError for a broken file."""
    file = lora_file(path)
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    return all("lora" in name for name in read_tensor_infos(file))


def read_lora(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA, each layer whole: down, up, a sane alpha, finite numbers; ModelError for any other."""
    file = lora_file(path)
    infos = read_tensor_infos(file)
    _refuse_other_kinds(file, infos)
    layers = _layers(file, infos)
    try:
        state, metadata = load_safetensors(file)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ModelError(f"the LoRA {file} cannot be read: {first_line(error)}; get it again") from None
    read_notes(file, metadata)
    for layer, names in layers.items():
        _check_layer(file, layer, {part: state[name] for part, name in names.items()})
    return state


def _refuse_other_kinds(file: Path, infos: Mapping[str, Any]) -> None:
    for mark, kind in OTHER_KINDS.items():
        found = next((name for name in infos if mark in name), None)
        if found is not None:
            raise ModelError(f"{file} is {kind} ({found}): only plain LoRAs are applied as a whole here; merge it into "
                             "the model with the tool that made it, and use the merged model")


def _layers(file: Path, infos: Mapping[str, Any]) -> Layers:
    layers: Layers = {}
    alphas: dict[str, str] = {}
    for name in infos:
        half = HALF.fullmatch(name)
        if half is not None:
            layers.setdefault(half["layer"], {})["down" if half["side"] in DOWN else "up"] = name
        elif name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = name
        else:
            raise ModelError(f"the LoRA {file} holds {name}, which no LoRA has: it would be skipped, get a plain LoRA")
    for layer, names in layers.items():
        if len(names) < 2:
            lost = "lora_A (down)" if "up" in names else "lora_B (up)"
            raise ModelError(f"the LoRA {file} lacks the {lost} of {layer}: the file is incomplete, get a complete one")
    for layer, name in alphas.items():
        if layer not in layers:
            raise ModelError(f"the LoRA {file} has an alpha for {layer} but no such layer: get a complete one")
        layers[layer]["alpha"] = name
    return layers


def _check_layer(file: Path, layer: str, tensors: Mapping[str, torch.Tensor]) -> None:
    down, up = tensors["down"], tensors["up"]
    linear = down.ndim == up.ndim == 2
    conv = down.ndim == up.ndim == 4 and up.shape[2:] == (1, 1)
    if not (linear or conv) or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise ModelError(f"the LoRA {file} has {list(down.shape)} and {list(up.shape)} in {layer}: expected two "
                         "matrices of one rank")
    for tensor in tensors.values():
        if not tensor.is_floating_point() or not is_finite(tensor):
            raise ModelError(f"the LoRA {file} holds NaN, infinity or no floating-point numbers in {layer}: it is "
                             "broken, get it again")
    alpha = tensors.get("alpha")
    if alpha is not None and (alpha.numel() != 1 or alpha.item() <= 0):
        raise ModelError(f"the LoRA {file} has the alpha {alpha.tolist()} in {layer}: expected one number above 0")


def read_notes(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """A LoRA's settings as diffusers notes them in the file, and builds the adapter from; {} where there are none."""
    try:
        notes: Any = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        numbers = [value for name, value in notes.items() if name.endswith((".r", ".lora_alpha"))]
        fits = all(isinstance(number, int | float) and 0 < number < float("inf") for number in numbers)
    except (ValueError, AttributeError, TypeError, RecursionError):
        notes, fits = {}, False
    if not fits:
        raise ModelError(f"the LoRA {file} has metadata (lora_adapter_metadata) that does not describe a LoRA: save it "
                         "again without")
    return notes


# -- applying


def apply_lora(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Give the pipeline's UNet and text encoder a LoRA's layers, all of them; ModelError where one does not fit."""
    file = lora_file(path)
    state = read_lora(path)
    layers = sum(HALF.fullmatch(name) is not None for name in state) // 2
    before = _count_layers(pipeline)
    try:
        with quiet_transformers():
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True)
    except Exception as error:  # diffusers and peft fail in many ways on names and shapes that do not fit
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"the LoRA {path} does not fit the model: {reason}") from None
    placed = _count_layers(pipeline) - before
    if not placed:
        raise ModelError(f"the LoRA {path} has no layer of this model: is it one for another family?")
    if placed != layers:
        raise ModelError(f"the LoRA {path} has {layers} layers, of which {placed} are this model's: it is one for "
                         "another model, and a part of it would be skipped")


def _count_layers(pipeline: StableDiffusionPipeline) -> int:
    parts = [part for part in cast(Any, pipeline).components.values() if isinstance(part, torch.nn.Module)]
    return sum(isinstance(module, LoraLayer) for part in parts for module in part.modules())
