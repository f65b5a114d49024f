"""Where a target model, its VAE and its component configs lie: found, checked and fingerprinted without loading."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from huggingface_hub import snapshot_download

from hgdpo_core.built_in import find_target, is_built_in
from hgdpo_core.config import TargetConfig, content_hash
from hgdpo_core.errors import ModelError
from hgdpo_core.models.backbone import find_family
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.models.weight_files import (
    INPUT_CHANNELS,
    TEXT_WIDTHS,
    WEIGHT_SUFFIXES,
    check_folder_weights,
    check_single_file,
    check_vae_file,
    read_tensor_infos,
)

PREDICTION_TYPES = ("epsilon", "v_prediction")
SD15_CONFIGS = Path(__file__).parent / "sd15"
PARTS = ("unet", "vae", "text_encoder")
LORA_NAME = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class TargetFiles:
    """All files a target is made of. `vae`: what replaces its own; `configs`: what a single file lacks."""

    path: Path
    vae: Path | None
    configs: Path | None
    commit: str | None
    """Of a model from the hub."""

    def fingerprint(self) -> str:
        """The commit of a hub model or sha256 of the weights; with a VAE or configs of its own, a hash of them all."""
        weights = self.commit or fingerprint_path(self.path)
        others = {name: fingerprint_path(path) for name, path in (("vae", self.vae), ("configs", self.configs)) if path}
        return content_hash({"weights": weights, **others}, length=64) if others else weights


def find_files(config: TargetConfig) -> TargetFiles:
    """The files a config names, checked to be there and of the right kind. ModelError, in one line, if not.

    A hub id is downloaded here (safetensors only), or found in the hub's local cache.
    """
    path, commit = _locate(config)
    if is_lora(path):
        raise ModelError(f"{path} is a LoRA: expected a whole model (diffusers folder, single file or hub id)")
    configs = None
    if path.is_file():
        configs = Path(config.component_configs).expanduser() if config.component_configs else SD15_CONFIGS
        check_pipeline_configs(configs)
        check_single_file(path, read_tensor_infos(path), own_vae=config.vae is None)
    elif config.component_configs:
        raise ModelError(f"target.component_configs is for a single file, and {path} is a folder with its own: "
                         "leave it out")
    else:
        find_family(path).check_folder(path)
    return TargetFiles(path, _find_vae(config.vae) if config.vae else None, configs, commit)


def _locate(config: TargetConfig) -> tuple[Path, str | None]:
    if is_built_in(config.source):
        return find_target(), None
    path = Path(config.source).expanduser()
    if path.exists():
        return path, None
    if not looks_like_hub_id(config.source):
        raise ModelError(f"model {config.source} does not exist: expected a diffusers folder, a single file "
                         f"({', '.join(WEIGHT_SUFFIXES)}) or a hub id like stable-diffusion-v1-5/stable-diffusion-v1-5")
    try:
        folder = Path(StableDiffusionPipeline.download(config.source, revision=config.revision, use_safetensors=True))
    except Exception as error:  # the hub client raises a wide family: all mean "could not be had"
        raise _no_download("model", config.source, error) from None
    return folder, folder.name


def _find_vae(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        if not looks_like_hub_id(source):
            raise ModelError(f"target.vae {source} does not exist: expected a diffusers folder, a single file or a hub "
                             "id like stabilityai/sd-vae-ft-mse")
        try:
            path = Path(snapshot_download(source, allow_patterns=["config.json", "*.safetensors"]))
        except Exception as error:  # see _locate
            raise _no_download("target.vae", source, error) from None
    if path.is_file():
        check_vae_file(path, read_tensor_infos(path))
        return path
    path = path / "vae" if (path / "model_index.json").exists() else path  # a whole pipeline: its VAE
    if read_config(path / "config.json").get("_class_name") != "AutoencoderKL":
        raise ModelError(f"target.vae {path} holds no AutoencoderKL, the kind of VAE that Stable Diffusion uses")
    check_folder_weights(path)
    return path


def looks_like_hub_id(source: str) -> bool:
    """Whether a source that is no path here can be owner/name on the hub."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not source.endswith(WEIGHT_SUFFIXES)


def _no_download(what: str, source: str, error: Exception) -> ModelError:
    return ModelError(f"{what} {source} is no local folder and could not be downloaded from the hub: "
                      f"{first_line(error)}")


def lora_file(path: Path) -> Path:
    """The weights of a LoRA that is a file, or a folder as diffusers saves it."""
    return path / LORA_NAME if path.is_dir() else path


def is_lora(path: Path) -> bool:
    """Whether a local path is a LoRA, and not a whole model, by its tensors' names; ModelError for a broken file."""
    file = lora_file(path)
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    return all("lora" in name for name in read_tensor_infos(file))


def check_folder(path: Path) -> None:
    """Refuse, before anything loads, a folder that is not a whole Stable Diffusion 1.x pipeline."""
    check_pipeline_configs(path)
    for part in PARTS:
        check_folder_weights(path / part)


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
    scheduler = path / "scheduler" / "scheduler_config.json"
    prediction = read_config(scheduler).get("prediction_type", "epsilon") if scheduler.exists() else None
    if prediction not in PREDICTION_TYPES:
        raise ModelError(f"{path} predicts {prediction!r}: expected {' or '.join(PREDICTION_TYPES)}")


def check_channels(path: Path, channels: int, latent_channels: int) -> None:
    """Refuse a UNet that takes anything but its VAE's latents."""
    if channels != latent_channels:
        what = f" ({INPUT_CHANNELS[channels]} cannot be tuned here)" if channels in INPUT_CHANNELS else ""
        raise ModelError(f"the UNet of {path} takes {channels} input channels: expected the {latent_channels} of its "
                         f"VAE's latents{what}")


def read_config(path: Path) -> dict[str, Any]:
    """A component's JSON config; ModelError where it is missing or no JSON object."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: expected a folder saved by diffusers' save_pretrained") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}; get it again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object: get it again")
    return config


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name, cut at 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
