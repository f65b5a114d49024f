"""The files of a Stable Diffusion XL model, recognised and checked without loading: a folder, or a single file."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from transformers import CLIPTextConfig

from hgdpo_core.errors import ModelError
from hgdpo_core.models.files import check_channels
from hgdpo_core.models.networks import (
    UNREAD_TEXT,
    below,
    check_component,
    check_single_vae,
    compare_converted,
    compare_shapes,
    expected_shapes,
    plain_names,
)
from hgdpo_core.models.prediction import check_prediction
from hgdpo_core.models.tokenizers import check_tokenizer, load_clip_tokenizer
from hgdpo_core.models.weight_files import (
    INPUT_CHANNELS,
    UNET,
    VAE,
    WEIGHT_SUFFIXES,
    TensorInfo,
    read_config,
    read_tensor_infos,
)

CONFIGS = Path(__file__).parent / "sdxl"
PIPELINE = "StableDiffusionXLPipeline"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TEXT, TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
FIRST = UNET + "input_blocks.0.0.weight"
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Keys of single files that say how their model predicts, which ComfyUI and Forge read too."""
EXPECTED = "expected a whole Stable Diffusion XL model (not its refiner)"
SIZES_READ = 6  # the refiner reads 5


def is_single_file(path: Path) -> bool:
    """Whether a file has the second text encoder of Stable Diffusion XL under its original name."""
    state = path.stat()
    return path.suffix in WEIGHT_SUFFIXES and _has_second_encoder(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)  # a file is asked for its family whenever it is found or loaded; a .ckpt is read whole
def _has_second_encoder(path: Path, size: int, changed: int) -> bool:
    return any(name.startswith(TEXT_2) for name in read_tensor_infos(path))


def check_files(path: Path, configs: Path | None, *, own_vae: bool, loads: bool = False) -> None:
    """Refuse, before anything loads, what is not a whole Stable Diffusion XL: a folder, or a file with its configs.

    `own_vae`: the model's own VAE will be used, so it must be whole too.
    """
    check_configs(configs or path)
    if configs is None:
        for part in PARTS:
            if part != "vae" or own_vae:
                check_component(path / part, part, read_config(path / part / "config.json"))
        return
    infos = read_tensor_infos(path)
    if FIRST not in infos:
        raise ModelError(f"{path} holds no UNet under {UNET}: {EXPECTED}")
    channels = infos[FIRST].shape[1] if len(infos[FIRST].shape) > 1 else None
    if channels in INPUT_CHANNELS:
        raise ModelError(f"{path} is {INPUT_CHANNELS[channels]} (its UNet takes {channels} input channels): {EXPECTED}")
    if own_vae and not any(name.startswith(VAE) for name in infos):
        raise ModelError(f"{path} holds no VAE: set target.vae to one, for example madebyollin/sdxl-vae-fp16-fix")
    check_networks(path, infos, {part: read_config(configs / part / "config.json") for part in PARTS}, own_vae=own_vae)


def check_networks(path: Path, infos: Mapping[str, TensorInfo], configs: Mapping[str, Mapping[str, Any]], *,
                   own_vae: bool) -> None:
    """ModelError where a single file does not hold exactly the networks of `configs`."""
    compare_converted(path, "unet", below(infos, UNET), configs["unet"], convert_ldm_unet_checkpoint)
    given = {name.removeprefix(TEXT): info.shape for name, info in below(infos, TEXT).items()}
    given = {name: shape for name, shape in plain_names(given).items() if not name.startswith(UNREAD_TEXT)}
    compare_shapes(path, "text_encoder", given, plain_names(expected_shapes(path, "text_encoder",
                                                                            configs["text_encoder"])))
    _check_open_clip(path, below(infos, TEXT_2), configs["text_encoder_2"])
    if own_vae:
        check_single_vae(path, infos, configs["vae"])


def _check_open_clip(path: Path, infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
    """The second text encoder, whose names and layout are OpenCLIP's: each layer's query, key and value in one."""
    config = CLIPTextConfig(**config).to_dict()  # some leave defaults out
    layers, width, inner = (config[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    expected = {"token_embedding.weight": (config["vocab_size"], width),
                "positional_embedding": (config["max_position_embeddings"], width), "ln_final.weight": (width,),
                "ln_final.bias": (width,), "text_projection": (width, config["projection_dim"])}
    for layer in range(layers):
        shapes = {"ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
                  "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
                  "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
                  "mlp.c_fc.weight": (inner, width), "mlp.c_fc.bias": (inner,), "mlp.c_proj.weight": (width, inner),
                  "mlp.c_proj.bias": (width,)}
        expected |= {f"transformer.resblocks.{layer}.{name}": shape for name, shape in shapes.items()}
    given = {name.removeprefix(TEXT_2): info.shape for name, info in infos.items()}
    compare_shapes(path, "text_encoder_2", {name: shape for name, shape in given.items() if name != "logit_scale"},
                   expected)


def check_configs(path: Path) -> None:
    """Refuse a diffusers folder whose configs are not those of a Stable Diffusion XL text-to-image pipeline."""
    if not (path / "model_index.json").exists():
        raise ModelError(f"{path} has no model_index.json: expected a folder saved by diffusers' save_pretrained")
    kind = read_config(path / "model_index.json").get("_class_name")
    if kind != PIPELINE:
        raise ModelError(f"{path} holds a {kind}: expected a {PIPELINE}")
    unet, vae, first, second = (read_config(path / part / "config.json") for part in PARTS)
    check_channels(path, unet.get("in_channels", 4), vae.get("latent_channels", 4))
    if vae.get("latents_mean") is not None:
        raise ModelError(f"the VAE of {path} has latents_mean, as Playground's: such latents are not supported")
    width = first.get("hidden_size", 0) + second.get("hidden_size", 0)
    if unet.get("cross_attention_dim") != width:
        raise ModelError(f"the UNet of {path} reads text {unet.get('cross_attention_dim')} wide, its two text encoders "
                         f"give {width}: {EXPECTED}")
    sizes = unet.get("projection_class_embeddings_input_dim", 0) - second.get("projection_dim", 0)
    if sizes != SIZES_READ * unet.get("addition_time_embed_dim", 0):
        raise ModelError(f"the UNet of {path} does not read a pooled embedding of {second.get('projection_dim')} and "
                         f"{SIZES_READ} sizes: {EXPECTED}")
    check_prediction(path)
    for part, config in (("tokenizer", first), ("tokenizer_2", second)):
        tokenizer = load_clip_tokenizer(path / part)
        check_tokenizer(path / part, lambda text, read=tokenizer: read(text).input_ids, config.get("vocab_size"))


def schedule_of_keys(path: Path) -> dict[str, Any]:
    """Settings of the scheduler that a single file states by its keys: that it predicts v, zero terminal SNR."""
    names = read_tensor_infos(path).keys()
    stated = {"prediction_type": "v_prediction"} if V_PREDICTION in names else {}
    return stated | ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if ZERO_SNR in names else {})
