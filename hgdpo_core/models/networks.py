"""Checks that weights are a network's, whole: names and shapes against an empty network of its config.

Nothing is read but headers, so this is done before any work; what only values show (NaN, infinity) is checked when
the weights are loaded. diffusers and transformers fill a weight that is missing with random numbers or leave it
uninitialised, and ignore one that they do not recognise.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hgdpo_core.errors import ModelError, first_line
from hgdpo_core.models.hub import quiet_transformers
from hgdpo_core.models.weight_files import TEXT, UNET, VAE, TensorInfo, read_tensor_infos

Shapes = Mapping[str, tuple[int, ...]]

STEMS = ("diffusion_pytorch_model", "model")
NO_WEIGHTS = ("position_ids", "rotary_emb.inv_freq")
"""Ends of names that older savers wrote and nothing reads: constants of the architecture."""
UNREAD_TEXT = ("text_projection", "logit_scale", "vision_model.", "visual_projection")  # of CLIP, beside its text tower
UNREAD_VAE = ("loss.", "model_ema.", "quantize.")  # of the VAE's own training
WRAPPER = "text_model."  # older savers of text encoders wrote it, newer ones do not
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unet": UNet2DConditionModel.from_config, "vae": AutoencoderKL.from_config,
    "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
    "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config))}


def empty_network(path: Path, part: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """A pipeline's `part` (unet, vae, text_encoder) without storage; ModelError where its config makes none."""
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            return KINDS[part](dict(config))
    except Exception as error:  # any value of any setting may be wrong, and each fails in its own way
        raise ModelError(f"{path} holds no usable config of a {part}: {first_line(error)}; get it again") from None


def expected_shapes(path: Path, part: str, config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the weights that a pipeline's `part` with this config has."""
    return _cached_shapes(path, part, json.dumps(dict(config), sort_keys=True))


@functools.lru_cache(maxsize=16)
def _cached_shapes(path: Path, part: str, config: str) -> Shapes:
    return shapes_of(empty_network(path, part, json.loads(config)))


def shapes_of(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's weights."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def compare_shapes(path: Path | str, part: str, given: Shapes, expected: Shapes) -> None:
    """ModelError that names the first weight that is missing, misshapen or not the network's.

    `path` begins the message, with or without words before it.
    """
    given = {name: shape for name, shape in given.items() if not name.endswith(NO_WEIGHTS)}
    expected = {name: shape for name, shape in expected.items() if not name.endswith(NO_WEIGHTS)}
    missing, surplus = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing:
        raise ModelError(f"{path} lacks {part}'s {missing[0]}{_such(missing)}: the file is incomplete or another "
                         "model's, get a complete one")
    if surplus:
        raise ModelError(f"{path} holds the unknown {surplus[0]}{_such(surplus)} beside {part}'s weights: these are "
                         "weights of another model")
    for name, shape in expected.items():
        if given[name] != shape:
            raise ModelError(f"{path} holds {part}'s {name} as {list(given[name])}, expected {list(shape)}: these are "
                             "weights of another model")


def _such(names: list[str]) -> str:
    return f" ({len(names)} such tensors)" if len(names) > 1 else ""


def refuse_report(path: str, report: Mapping[str, Any], ignored: tuple[str, ...] = ()) -> None:
    """ModelError where transformers reports weights that it made up, ignored or could not fit.

    Unknown names that begin with one of `ignored` are accepted: they are of a part that is not used.
    """
    for verb, key in (("lacks", "missing_keys"), ("holds the unknown", "unexpected_keys"),
                      ("holds the misshapen", "mismatched_keys")):
        names = sorted(str(name) for name in report.get(key) or ()
                       if key != "unexpected_keys" or not (str(name).startswith(ignored) or name.endswith(NO_WEIGHTS)))
        if names:
            raise ModelError(f"{path} {verb} {names[0]} ({len(names)} such tensors): these are weights of another "
                             "model")


# -- diffusers folders


def component_files(folder: Path) -> list[Path]:
    """The weight files of a component that its library reads: one, or the shards of an index; ModelError if none."""
    for suffix in (".safetensors", ".bin"):
        for stem in STEMS:
            index = folder / f"{stem}{suffix}.index.json"
            if index.is_file():
                return [folder / name for name in sorted(set(_weight_map(index).values()))]
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
    others = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    there = f", only {', '.join(others[:3])}" if others else ""
    raise ModelError(f"{folder} holds no weights under the names that are read ({STEMS[0]}.safetensors or "
                     f"{STEMS[1]}.safetensors){there}: get a complete copy of the model")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_bytes())["weight_map"]
        return {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{index} is not an index of weight files: get it again") from None


def component_infos(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a component's weight files, from their headers."""
    return {name: info for file in component_files(folder) for name, info in read_tensor_infos(file).items()}


def check_component(folder: Path, part: str, config: Mapping[str, Any]) -> None:
    """ModelError where a diffusers component folder does not hold exactly the weights of its config."""
    given = {name: info.shape for name, info in component_infos(folder).items()}
    compare_shapes(folder, part, plain_names(given), plain_names(expected_shapes(folder, part, config)))


def plain_names(shapes: Shapes) -> Shapes:
    """Names without what only some versions of the libraries write, and all of them read."""
    return {_plain_name(name): shape for name, shape in shapes.items()}


def _plain_name(name: str) -> str:
    found = re.fullmatch(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    return f"{found[1]}.{OLD_ATTENTION[found[2]]}.{found[3]}" if found else name.removeprefix(WRAPPER)


# -- single files


def check_single_networks(path: Path, infos: Mapping[str, TensorInfo], configs: Mapping[str, Mapping[str, Any]], *,
                          own_vae: bool) -> None:
    """ModelError where a single file does not hold exactly the networks of `configs` (unet, vae, text_encoder)."""
    compare_converted(path, "unet", below(infos, UNET), configs["unet"], convert_ldm_unet_checkpoint)
    given = {name.removeprefix(TEXT).removeprefix(WRAPPER): info.shape for name, info in below(infos, TEXT).items()}
    given = {name: shape for name, shape in given.items() if not name.startswith(UNREAD_TEXT)}
    expected = plain_names(expected_shapes(path, "text_encoder", configs["text_encoder"]))
    compare_shapes(path, "text_encoder", given, expected)
    if own_vae:
        check_single_vae(path, infos, configs["vae"])


def check_single_vae(path: Path, infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
    """ModelError where a single file, with or without the prefix of a checkpoint, does not hold exactly this VAE."""
    found = below(infos, VAE) or dict(infos)
    found = {name: info for name, info in found.items() if not name.removeprefix(VAE).startswith(UNREAD_VAE)}
    compare_converted(path, "vae", found, config, convert_ldm_vae_checkpoint)


def below(infos: Mapping[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    return {name: info for name, info in infos.items() if name.startswith(prefix)}


def compare_converted(path: Path, part: str, infos: Mapping[str, TensorInfo], config: Mapping[str, Any],
                       convert: Callable[..., dict[str, torch.Tensor]]) -> None:
    """The same with diffusers' own renaming, run on tensors without storage."""
    expected = expected_shapes(path, part, config)
    given = {name: torch.empty(info.shape, device="meta") for name, info in infos.items()}
    try:
        with quiet_transformers():
            converted = convert(dict(given), config=dict(config))
    except Exception as error:  # the converter expects whole files, and fails in many ways on others
        raise ModelError(f"{path} does not hold the {part} of its config ({first_line(error)}): the file is incomplete "
                         "or another model's, get a complete one") from None
    converted = {name: tensor for name, tensor in converted.items() if tensor is not None}
    read = {id(tensor if tensor._base is None else tensor._base) for tensor in converted.values()}
    left = {f"(as {name})": info.shape for name, info in infos.items()
            if id(given[name]) not in read and not name.endswith(NO_WEIGHTS)}
    compare_shapes(path, part, {name: tuple(tensor.shape) for name, tensor in converted.items()} | left, expected)


# -- values


def check_finite(path: Path | str, components: Mapping[str, Any], advice: str = "the weights are broken") -> None:
    """ModelError naming the first weight of loaded networks (or dicts of tensors) that is not finite or not loaded."""
    for part, holder in components.items():
        tensors = holder.state_dict() if isinstance(holder, torch.nn.Module) else holder
        for name, tensor in tensors.items() if isinstance(tensors, dict) else ():
            if tensor.is_meta:
                raise ModelError(f"{path} lacks {part}'s {name}: the file is incomplete, get a complete one")
            if tensor.is_floating_point() and not is_finite(tensor):
                raise ModelError(f"{path} holds NaN or infinity in {part}'s {name} as {str(tensor.dtype)[6:]}: "
                                 f"{advice}")


def is_finite(tensor: torch.Tensor) -> bool:
    """One pass without a temporary: a sum is finite when all is; the exact test decides where it is not."""
    return math.isfinite(tensor.sum(dtype=torch.float32)) or bool(torch.isfinite(tensor).all())
