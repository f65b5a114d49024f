"""The files of a target model, its VAE and its component configs: found, checked and fingerprinted without loading."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from diffusers import StableDiffusionPipeline
from huggingface_hub import snapshot_download

from hgdpo_core.built_in import find_target, find_vae, is_any_built_in, is_built_in, shared_vae
from hgdpo_core.config import TargetConfig
from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import ConfigError, ModelError, first_line
from hgdpo_core.models import weight_files
from hgdpo_core.models.backbone import FAMILIES, FileFamily, family_name, find_family
from hgdpo_core.models.fingerprints import fingerprint_path, refuse_special_files
from hgdpo_core.models.hub import find_or_download, looks_like_hub_id
from hgdpo_core.models.lora_files import LORA_NAME, is_lora, lora_file
from hgdpo_core.models.networks import check_component, check_single_networks, check_single_vae
from hgdpo_core.models.prediction import check_prediction, default_prediction, find_prediction
from hgdpo_core.models.tokenizers import check_tokenizer, load_clip_tokenizer
from hgdpo_core.models.weight_files import (
    INPUT_CHANNELS,
    TEXT_WIDTHS,
    WEIGHT_SUFFIXES,
    TensorInfo,
    read_config,
    read_tensor_infos,
)

__all__ = ["LORA_NAME", "PARTS", "SD15_CONFIGS", "TargetFiles", "check_channels", "find_files", "first_line", "is_lora",
           "lora_file", "looks_like_hub_id", "read_config"]

SD15_CONFIGS = Path(__file__).parent / "sd15"
PARTS = ("unet", "vae", "text_encoder")
TITLES = {"sd15": "a model of the SD 1.5 family", "sdxl": "a model of the Stable Diffusion XL family"}


@dataclass(frozen=True)
class TargetFiles:
    """All files a target is made of. `vae`: what replaces its own; `configs`: what a single file lacks."""

    path: Path
    vae: Path | None
    configs: Path | None
    commit: str | None
    """Of a model from the hub."""
    prediction_type: str | None = None
    """Of a single file, where a setting or a yaml beside it says so."""
    default_prediction: str | None = None
    """What its keys and configs say."""

    def fingerprint(self) -> str:
        """The commit of a hub model or sha256 of the weights; with a VAE or configs of its own, a hash of them all.

        And of what it predicts, where that is not what its keys and configs say.
        """
        weights = self.commit or fingerprint_path(self.path)
        others = {name: fingerprint_path(path) for name, path in (("vae", self.vae), ("configs", self.configs)) if path}
        if self.prediction_type not in (None, self.default_prediction):
            others["prediction_type"] = self.prediction_type
        return content_hash({"weights": weights, **others}, length=64) if others else weights


def find_files(config: TargetConfig) -> TargetFiles:
    """The files a config names, checked to be there and of the right kind. ModelError, in one line, if not.

    A hub id is downloaded here (safetensors only), or found in the hub's local cache.
    """
    path, commit = _locate(config)
    refuse_special_files(path)
    if is_lora(path):
        raise ModelError(f"{path} is a LoRA: expected a whole model (diffusers folder, single file or hub id)")
    refuse_other_family(path, config.family)
    family, configs, vae = find_family(path), None, config.vae or shared_vae(config.source)
    if path.is_file():
        shipped = cast(FileFamily, family).configs
        configs = Path(config.component_configs).expanduser() if config.component_configs else shipped
        refuse_special_files(configs)
    elif alone := next((name for name in ("component_configs", "prediction_type") if getattr(config, name)), None):
        raise ModelError(f"target.{alone} is for a single file, and {path} is a folder with its own: leave it out")
    if configs is None:
        family.check_folder(path, own_vae=vae is None)
        return TargetFiles(path, _find_vae(vae) if vae else None, None, commit)
    cast(FileFamily, family).check_file(path, configs, own_vae=vae is None)
    default = cast(FileFamily, family).schedule_of_keys(path).get("prediction_type", default_prediction(configs))
    return TargetFiles(path, _find_vae(vae) if vae else None, configs, commit,
                       find_prediction(path, config.prediction_type, default), default)


def refuse_other_family(path: Path, expected: str | None) -> None:
    """ModelError for a model of another family than the settings are for."""
    if expected is None:
        return
    if expected not in FAMILIES:
        raise ConfigError(f"target.family is {expected!r}: expected one of {', '.join(FAMILIES)}")
    found = family_name(path)
    if found != expected:
        raise ModelError(f"{path} is {TITLES.get(found, found)}, these settings are for "
                         f"{TITLES.get(expected, expected)}: use --preset {found}, or the model that was meant")


def _locate(config: TargetConfig) -> tuple[Path, str | None]:
    if is_any_built_in(config.source):
        return find_target(config.source), None
    download = partial(StableDiffusionPipeline.download, config.source, revision=config.revision, use_safetensors=True)
    path = find_or_download("model", config.source, download, "a diffusers folder, a single file "
                            f"({', '.join(WEIGHT_SUFFIXES)}) or a hub id like "
                            "stable-diffusion-v1-5/stable-diffusion-v1-5")
    return path, None if Path(config.source).expanduser().exists() else path.name


def _find_vae(source: str) -> Path:
    if is_built_in(source):
        return find_vae()
    download = partial(snapshot_download, source, allow_patterns=["config.json", "*.safetensors"])
    path = find_or_download("target.vae", source, download, "a diffusers folder, a single file or a hub id like "
                            "stabilityai/sd-vae-ft-mse")
    path = path / "vae" if (path / "model_index.json").exists() else path  # a whole pipeline: its VAE
    refuse_special_files(path)
    check_vae(path)
    return path


def check_files(path: Path, configs: Path | None, *, own_vae: bool, loads: bool = False) -> None:
    """Refuse, before anything loads, what is not a whole Stable Diffusion 1.x: a folder, or a file with its configs.

    `own_vae`: the model's own VAE will be used, so it must be whole too; `loads`: with these configs and no others.
    """
    parts = [part for part in PARTS if part != "vae" or own_vae]
    check_pipeline_configs(configs or path)
    if configs is None:
        for part in parts:
            check_component(path / part, part, read_config(path / part / "config.json"))
        return
    infos = read_tensor_infos(path)
    weight_files.check_single_file(path, infos, own_vae=own_vae)
    if not loads and configs == SD15_CONFIGS and _other_width(infos, configs):
        return  # the configs it needs were not given: loading it raises
    check_single_networks(path, infos, {part: read_config(configs / part / "config.json") for part in PARTS},
                          own_vae=own_vae)


def _other_width(infos: Mapping[str, TensorInfo], configs: Path) -> bool:
    width = read_config(configs / "unet" / "config.json")["block_out_channels"][0]
    shape = infos[weight_files.UNET_FIRST].shape
    return len(shape) == 4 and shape[0] != width


def check_vae(path: Path) -> None:
    """Refuse what is not a whole VAE of Stable Diffusion: a single file or a diffusers folder."""
    if path.is_file():
        infos = read_tensor_infos(path)
        weight_files.check_vae_file(path, infos)
        check_single_vae(path, infos, read_config(SD15_CONFIGS / "vae" / "config.json"))  # SDXL's has its shapes
        return
    config = read_config(path / "config.json")
    if config.get("_class_name") != "AutoencoderKL":
        raise ModelError(f"target.vae {path} holds no AutoencoderKL, the kind of VAE that Stable Diffusion uses")
    check_component(path, "vae", config)


def check_pipeline_configs(path: Path) -> None:
    """Refuse a diffusers folder whose configs are not those of a Stable Diffusion 1.x text-to-image pipeline."""
    if not (path / "model_index.json").exists():
        raise ModelError(f"{path} has no model_index.json: expected a folder saved by diffusers' save_pretrained")
    kind = read_config(path / "model_index.json").get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise ModelError(f"{path} holds a {kind}: expected a StableDiffusionPipeline (the SD 1.5 family)")
    unet, vae = (read_config(path / part / "config.json") for part in ("unet", "vae"))
    check_channels(path, unet.get("in_channels", 4), vae.get("latent_channels", 4))
    width = unet.get("cross_attention_dim")
    if width in TEXT_WIDTHS:
        raise ModelError(f"{path} is {TEXT_WIDTHS[width]} (its UNet reads text {width} wide): expected a model of the "
                         "SD 1.5 family")
    check_prediction(path)
    vocabulary = read_config(path / "text_encoder" / "config.json").get("vocab_size")
    tokenizer = load_clip_tokenizer(path / "tokenizer")
    check_tokenizer(path / "tokenizer", lambda text: tokenizer(text).input_ids, vocabulary)


def check_channels(path: Path, channels: int, latent_channels: int) -> None:
    """Refuse a UNet that takes anything but its VAE's latents."""
    if channels != latent_channels:
        what = f" ({INPUT_CHANNELS[channels]} cannot be tuned here)" if channels in INPUT_CHANNELS else ""
        raise ModelError(f"the UNet of {path} takes {channels} input channels: expected the {latent_channels} of its "
                         f"VAE's latents{what}")
