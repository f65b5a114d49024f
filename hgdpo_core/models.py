"""The target model and the tuned one: found, checked and fingerprinted without loading; loaded when work needs them."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from hgdpo_core.config import PromptSyntax, TargetConfig, content_hash
from hgdpo_core.errors import ConfigError, ModelError
from hgdpo_core.fingerprints import fingerprint_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PREDICTION_TYPES = ("epsilon", "v_prediction")
LORA_NAME = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Lora:
    """A LoRA's .safetensors file, or the diffusers folder that holds it, and the weight it is used with."""

    path: Path
    weight: float
    fingerprint: str


@dataclass(frozen=True)
class Model:
    """A model that can be loaded: where it lies, what it is, how it samples. Cheap; holds no tensors."""

    path: Path
    fingerprint: str
    dtype: str
    negative_prompt: str = ""
    clip_skip: int | None = None
    lora: Lora | None = None
    hub_id: str | None = None
    """Where the model was downloaded from, at the commit that is its fingerprint; None for one that lies on a disk."""
    prompt_syntax: PromptSyntax = "plain"
    negative_syntax: PromptSyntax = "plain"

    @property
    def id(self) -> str:
        """Readable id: the folder's or file's name and a hash of all that changes an image."""
        name = "".join(c if c.isalnum() else "-" for c in self.path.stem)[:24].strip("-") or "model"
        return f"{name}-{content_hash(self.identity())}"

    def identity(self) -> dict[str, Any]:
        """What decides the images of this model: the settings a pool's id is made of."""
        lora = {"fingerprint": self.lora.fingerprint, "weight": self.lora.weight} if self.lora else None
        return {"fingerprint": self.fingerprint, "dtype": self.dtype, "negative_prompt": self.negative_prompt,
                "clip_skip": self.clip_skip, "lora": lora, **self.syntax()}

    def syntax(self) -> dict[str, PromptSyntax]:
        """How prompts are written, for ids: what is plain is left out, as it was before there was a choice."""
        found: dict[str, PromptSyntax] = {}
        if self.prompt_syntax != "plain":
            found["prompt_syntax"] = self.prompt_syntax
        if self.negative_syntax != "plain" and self.negative_prompt:
            found["negative_syntax"] = self.negative_syntax
        return found

    def reading(self, syntax: PromptSyntax) -> "Model":
        """The same model for prompts written in another syntax; its negative prompt is read as before."""
        return replace(self, prompt_syntax=syntax)

    def with_lora(self, path: Path, weight: float) -> "Model":
        """The same model wearing a LoRA, a folder or a .safetensors file, at a weight."""
        return replace(self, lora=Lora(path, weight, fingerprint_path(lora_file(path))))


def lora_file(path: Path) -> Path:
    """The weights of a LoRA that is a file, or a folder as diffusers saves it."""
    return path / LORA_NAME if path.is_dir() else path


def is_lora(path: Path) -> bool:
    """Whether a local path is a LoRA, and not a whole model, by its tensors' names; ModelError for a broken file."""
    file = lora_file(path)
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a readable .safetensors file: {_first_line(error)}") from None
    return bool(names) and all("lora" in name for name in names)


def find_model(config: TargetConfig) -> Model:
    """The model a config names, checked to be there and of the right kind. ModelError, in one line, if not.

    A hub id is downloaded here (safetensors only); its fingerprint is the commit.
    """
    path, commit = _locate(config)
    if is_lora(path):
        raise ModelError(f"{path} is a LoRA: expected a whole model (diffusers folder, .safetensors file or hub id)")
    if path.is_dir():
        check_folder(path)
    return Model(path=path, fingerprint=commit or fingerprint_path(path), dtype=resolve_dtype(config.dtype),
                 negative_prompt=config.negative_prompt, clip_skip=config.clip_skip,
                 hub_id=config.source if commit else None,
                 prompt_syntax=config.prompt_syntax, negative_syntax=config.prompt_syntax)


def recorded_syntax(settings: Mapping[str, Any]) -> dict[str, PromptSyntax]:
    """`prompt_syntax` and `negative_syntax` of a model whose `identity()` or `syntax()` was recorded."""
    return {name: settings.get(name, "plain") for name in ("prompt_syntax", "negative_syntax")}


def _locate(config: TargetConfig) -> tuple[Path, str | None]:
    if config.source == "figures":
        from hgdpo_core import figures

        return figures.target_path(), None
    path = Path(config.source).expanduser()
    if path.is_dir() or path.suffix == ".safetensors" and path.is_file():
        return path, None
    if path.is_file():
        raise ModelError(f"{path} is a file, but no .safetensors: convert it to one, or to a diffusers folder")
    if path.is_absolute() or config.source.startswith(".") or config.source.count("/") != 1:
        raise ModelError(f"model {config.source} does not exist: expected a diffusers folder, a .safetensors file "
                         "or a hub id like runwayml/stable-diffusion-v1-5")
    return _download(config)


def _download(config: TargetConfig) -> tuple[Path, str]:
    try:
        folder = Path(StableDiffusionPipeline.download(config.source, revision=config.revision, use_safetensors=True))
    except Exception as error:  # the hub client raises a wide family: all mean "could not be had"
        raise ModelError(f"model {config.source} is no local folder and could not be downloaded from the hub: "
                         f"{_first_line(error)}") from None
    return folder, folder.name


def check_folder(path: Path) -> None:
    """Refuse, before anything loads, a folder that is not a Stable Diffusion 1.x pipeline."""
    index = path / "model_index.json"
    if not index.exists():
        raise ModelError(f"{path} has no model_index.json: expected a folder saved by diffusers' save_pretrained")
    kind = json.loads(index.read_text()).get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise ModelError(f"{path} holds a {kind}: expected a StableDiffusionPipeline (the SD 1.5 family)")
    scheduler = path / "scheduler" / "scheduler_config.json"
    prediction = json.loads(scheduler.read_text()).get("prediction_type", "epsilon") if scheduler.exists() else None
    if prediction not in PREDICTION_TYPES:
        raise ModelError(f"{path} predicts {prediction!r}: expected {' or '.join(PREDICTION_TYPES)}")


def load_pipeline(model: Model, device: str = "cpu", *, dtype: str | None = None,
                  vae_dtype: str | None = None) -> StableDiffusionPipeline:
    """The model as a plain diffusers pipeline in `dtype` (default: the model's own), without a safety checker.

    A LoRA is merged in float32 before the cast, so that its weight acts exactly and sampling costs nothing more.
    """
    wanted = DTYPES[dtype or model.dtype]
    load_dtype = torch.float32 if model.lora else wanted
    try:
        pipeline = _read_pipeline(model.path, load_dtype)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{model.path} does not load as Stable Diffusion 1.5: {_first_line(error)}") from None
    _check_unet(model.path, pipeline)
    if model.lora:
        _merge_lora(pipeline, model.lora)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            part_dtype = DTYPES[vae_dtype] if name == "vae" and vae_dtype else wanted
            torch.nn.Module.to(part, device=device, dtype=part_dtype).eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _read_pipeline(path: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    options: dict[str, Any] = {"dtype": dtype, "safety_checker": None}
    with _quiet_diffusers():
        if path.is_file():
            return StableDiffusionPipeline.from_single_file(str(path), **options)
        return StableDiffusionPipeline.from_pretrained(
            path, local_files_only=True, requires_safety_checker=False, **options)


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Without bars, and without advice on safety checkers and on text encoders that a LoRA leaves alone."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()


def _check_unet(path: Path, pipeline: StableDiffusionPipeline) -> None:
    channels, latent_channels = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if channels != latent_channels:
        raise ModelError(f"the UNet of {path} takes {channels} input channels: expected the {latent_channels} of its "
                         "VAE's latents (an inpainting model takes 9 and cannot be tuned here)")
    prediction = pipeline.scheduler.config.prediction_type
    if prediction not in PREDICTION_TYPES:
        raise ModelError(f"{path} predicts {prediction!r}: expected {' or '.join(PREDICTION_TYPES)}")


def _merge_lora(pipeline: StableDiffusionPipeline, lora: Lora) -> None:
    file = lora_file(lora.path)
    try:
        with _quiet_diffusers():
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise ModelError(f"the LoRA {lora.path} does not fit the model: {_first_line(error)}") from None
    if not any(pipeline.get_list_adapters().values()):  # diffusers passes over names that it cannot place
        raise ModelError(f"the LoRA {lora.path} has no layer of this model: is it one for another family?")
    pipeline.fuse_lora(lora_scale=lora.weight)
    pipeline.unload_lora_weights()


def resolve_dtype(dtype: str) -> str:
    """`auto` as a named precision: bfloat16 where the machine is fast at it, else float32."""
    if dtype != "auto":
        return dtype
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if cpu_has_fast_bfloat16() else "float32"


def cpu_has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def default_device() -> str:
    """The accelerator torch sees, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_device(device: str) -> str:
    """`device`, or ConfigError when torch cannot use it here."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device} was asked for, but torch {torch.__version__} sees no GPU: use cpu")
    return device


def device_name(device: str) -> str:
    """What a manifest records: the GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
