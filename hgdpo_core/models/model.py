"""The target model and the tuned one: found, checked and fingerprinted without loading; loaded when work needs them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from hgdpo_core.config import PromptSyntax, TargetConfig
from hgdpo_core.config.base import content_hash
from hgdpo_core.devices import DTYPES, resolve_dtype
from hgdpo_core.errors import HGDPOError, ModelError, first_line
from hgdpo_core.models.backbone import FileFamily, find_family
from hgdpo_core.models.files import SD15_CONFIGS, check_channels, check_files, check_vae, find_files, read_config
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.models.hub import quiet_transformers
from hgdpo_core.models.lora_files import apply_lora, lora_file
from hgdpo_core.models.networks import check_finite, empty_network
from hgdpo_core.models.personaliser import Adapter
from hgdpo_core.models.prediction import scheduler_with
from hgdpo_core.models.text_weights import read_flat_text_encoder, use_encoder_length

BROKEN = "the weights are broken (or, in float16, overflow: set target.dtype to float32)"
VAE_VERSION = 2  # 1 rounded the VAE's weights to the target's precision before it encoded in float32


@dataclass(frozen=True)
class Lora:
    """A LoRA's .safetensors file, or the diffusers folder that holds it, and the weight it is applied with."""

    path: Path
    weight: float
    fingerprint: str


@dataclass(frozen=True)
class Model:
    """A model that can be loaded: its files, its identity, its settings for sampling. Cheap; holds no tensors."""

    path: Path
    fingerprint: str
    dtype: str
    negative_prompt: str = ""
    clip_skip: int | None = None
    lora: Lora | None = None
    hub_id: str | None = None
    """Where the model was downloaded from, at the commit that is its fingerprint; None for one on a disk."""
    prompt_syntax: PromptSyntax = "plain"
    negative_syntax: PromptSyntax = "plain"
    vae: Path | None = None
    """What replaces the model's own VAE: an AutoencoderKL folder or a single file; part of the fingerprint."""
    configs: Path | None = None
    """Component configs and tokenizer of a single file; part of the fingerprint."""
    prediction_type: str | None = None
    """Of a single file, where a setting or a yaml says so; part of the fingerprint where its keys do not."""
    personaliser: Adapter | None = None
    """What reads the concepts of samples; None for a model that reads prompts alone."""
    auto_dtype: bool = field(default=False, compare=False)
    """Whether `dtype` was left to the machine that planned; it is part of no id, `dtype` is."""

    @property
    def id(self) -> str:
        """Readable id: the folder's or file's name and a hash of all that changes an image."""
        name = "".join(c if c.isalnum() else "-" for c in self.path.stem)[:24].strip("-") or "model"
        return f"{name}-{content_hash(self.identity())}"

    def identity(self) -> dict[str, Any]:
        """What decides the images of this model: the settings a pool's id is made of."""
        lora = {"fingerprint": self.lora.fingerprint, "weight": self.lora.weight} if self.lora else None
        personal = {"personaliser": self.personaliser.identity()} if self.personaliser else {}
        return {"fingerprint": self.fingerprint, "dtype": self.dtype, "negative_prompt": self.negative_prompt,
                "clip_skip": self.clip_skip, "lora": lora, **self.syntax(), **personal}

    def encoding(self) -> dict[str, int]:
        """For ids of latents: marks those encoded with the VAE's own weights, which in float32 were never rounded."""
        return {} if self.dtype == "float32" else {"vae_version": VAE_VERSION}

    def syntax(self) -> dict[str, PromptSyntax]:
        """How prompts are written, for ids: what is plain is left out, as it was before there was a choice."""
        negative = self.negative_syntax if self.negative_prompt else "plain"
        both: dict[str, PromptSyntax] = {"prompt_syntax": self.prompt_syntax, "negative_syntax": negative}
        return {name: syntax for name, syntax in both.items() if syntax != "plain"}

    def schedule(self) -> dict[str, Any]:
        """Settings of the scheduler that a single file states beside its configs; {} for a folder, which has its own.
        """
        if not self.path.is_file():
            return {}
        stated = cast(FileFamily, find_family(self.path)).schedule_of_keys(self.path)
        return stated | ({"prediction_type": self.prediction_type} if self.prediction_type else {})

    def reading(self, syntax: PromptSyntax) -> "Model":
        """The same model for prompts written in another syntax; its negative prompt is read as before."""
        return replace(self, prompt_syntax=syntax)

    def with_lora(self, path: Path, weight: float) -> "Model":
        """The same model with a LoRA, a folder or a .safetensors file, applied at a weight."""
        return replace(self, lora=Lora(path, weight, fingerprint_path(lora_file(path))))


def find_model(config: TargetConfig) -> Model:
    """The model a config names, checked to be there and of the right kind. ModelError, in one line, if not.

    A hub id is downloaded here (safetensors only); its fingerprint is the commit.
    """
    files = find_files(config)
    return Model(path=files.path, fingerprint=files.fingerprint(), dtype=resolve_dtype(config.dtype),
                 negative_prompt=config.negative_prompt, clip_skip=config.clip_skip, vae=files.vae,
                 configs=files.configs, prediction_type=files.prediction_type,
                 hub_id=config.source if files.commit and not files.vae else None,
                 prompt_syntax=config.prompt_syntax, negative_syntax=config.prompt_syntax,
                 auto_dtype=config.dtype == "auto")


@dataclass(frozen=True)
class PipelineKind:
    """A class of diffusers pipelines, as `load_pipeline` reads one."""

    title: str
    pipeline: Any
    configs: Path
    """The component configs that come with this package."""
    check: Callable[..., None]
    """Refuses what is not a whole model: (path, configs, own_vae=, loads=)."""
    options: Mapping[str, Any]
    """Of the class, to leave out what changes images."""
    text_parts: Mapping[str, str]
    """Its text encoders, and their tokenizers."""
    file_parts: Callable[[Model, torch.dtype], dict[str, Any]] = lambda model, dtype: {}
    """Components of a single file that diffusers would read in another way."""


SD15 = PipelineKind("Stable Diffusion 1.5", StableDiffusionPipeline, SD15_CONFIGS, check_files,
                    {"safety_checker": None, "requires_safety_checker": False}, {"text_encoder": "tokenizer"},
                    lambda model, dtype: read_flat_text_encoder(model.path, str(model.configs), dtype))


def check_lora_of(model: Model, path: Path, kind: PipelineKind) -> None:
    """Refuse, before anything loads, a LoRA that is broken or that this model cannot take as a whole."""
    configs = model.configs or model.path
    parts: dict[str, Any] = dict.fromkeys(("vae", "scheduler", "feature_extractor", *kind.text_parts.values()))
    for part in ("unet", *kind.text_parts):
        parts[part] = empty_network(configs, part, read_config(configs / part / "config.json"))
    apply_lora(kind.pipeline(**parts, **kind.options), path)


def recorded_syntax(settings: Mapping[str, Any]) -> dict[str, PromptSyntax]:
    """`prompt_syntax` and `negative_syntax` of a model whose `identity()` or `syntax()` was recorded."""
    return {name: settings.get(name, "plain") for name in ("prompt_syntax", "negative_syntax")}


def load_pipeline(model: Model, device: str = "cpu", *, dtype: str | None = None, vae_dtype: str | None = None,
                  kind: PipelineKind = SD15) -> StableDiffusionPipeline:
    """The model as a plain diffusers pipeline in `dtype` (default: the model's own), without a safety checker.

    A LoRA is merged in float32 before the cast, so that its weight acts exactly and sampling takes no longer; a
    `vae_dtype` is that of the file's own weights, which were not rounded to `dtype` before. ModelError, in one line,
    where the files do not hold the whole model, or hold a weight that is not finite.
    """
    final_dtype = DTYPES[dtype or model.dtype]
    load_dtype = torch.float32 if model.lora or vae_dtype else final_dtype
    vae = _load_vae(model.vae, load_dtype, kind) if model.vae else None
    kind.check(model.path, model.configs, own_vae=vae is None, loads=True)
    with _naming(model.path, kind.title):
        pipeline = _read_pipeline(model, load_dtype, vae, kind)
    check_channels(model.path, pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels)
    own = {name: part for name, part in pipeline.components.items() if name != "vae" or vae is None}
    check_finite(model.path, own, BROKEN)
    use_encoder_length(pipeline, kind.text_parts)
    if model.lora:
        apply_lora(pipeline, model.lora.path)
        pipeline.fuse_lora(lora_scale=model.lora.weight)
        pipeline.unload_lora_weights()
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            part_dtype = DTYPES[vae_dtype] if name == "vae" and vae_dtype else final_dtype
            torch.nn.Module.to(part, device=device, dtype=part_dtype).eval().requires_grad_(False)
    if load_dtype != final_dtype or model.lora:
        check_finite(model.lora.path if model.lora else model.path, pipeline.components, BROKEN)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def _naming(path: Path, what: str) -> Iterator[None]:
    """The libraries' errors as one line that names the file; their bars and warnings are silent."""
    try:
        with quiet_transformers():
            yield
    except HGDPOError:
        raise
    except Exception as error:  # the files passed our checks: any kind of error is left
        raise ModelError(f"{path} does not load as {what}: {first_line(error)}") from None


def _read_pipeline(model: Model, dtype: torch.dtype, vae: AutoencoderKL | None,
                   kind: PipelineKind) -> StableDiffusionPipeline:
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    given: dict[str, Any] = {"vae": vae} if vae is not None else {}
    if model.path.is_file():
        given |= scheduler_with(model.configs or kind.configs, model.schedule()) | kind.file_parts(model, dtype)
        own = {name: value for name, value in kind.options.items() if name != "requires_safety_checker"}
        return kind.pipeline.from_single_file(str(model.path), config=str(model.configs), **own, **given, **options)
    return kind.pipeline.from_pretrained(model.path, **kind.options, **given, **options)


def _load_vae(path: Path, dtype: torch.dtype, kind: PipelineKind) -> AutoencoderKL:
    """The VAE that replaces a model's own; errors name its own file."""
    check_vae(path)
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    with _naming(path, f"a VAE of {kind.title}"):
        if path.is_dir():
            vae = AutoencoderKL.from_pretrained(path, **options)
        else:
            vae = AutoencoderKL.from_single_file(str(path), config=str(kind.configs), subfolder="vae", **options)
    check_finite(path, {"vae": vae}, BROKEN)
    return vae
