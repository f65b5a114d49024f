"""Common to the benchmarks: targets to generate with, a clock, and how fast a device multiplies."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hgdpo_core.config import RunConfig, TargetConfig
from hgdpo_core.config.presets import figures, sd15
from hgdpo_core.devices import DTYPES
from hgdpo_core.figures import prompts as figures_prompts
from hgdpo_core.models import Model, find_model
from hgdpo_core.models.files import SD15_CONFIGS

SIZES = ("figures", "sd15", "tiny")
"""figures: the built-in target. sd15: Stable Diffusion 1.5 with random weights. tiny: its shape, narrow, to see that
the pipeline of sd15 runs."""
NARROW: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 8, "cross_attention_dim": 32,
             "attention_head_dim": 4},
    "vae": {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def random_target(folder: Path, changes: dict[str, dict[str, Any]], *, in_range: bool = False) -> Path:
    """A diffusers folder of SD 1.5 with random float32 weights, some settings of its parts changed.

    `in_range`: UNet's and VAE's weights as their fan-in asks, so that values keep their size and images have contrast.
    """
    torch.manual_seed(0)
    unet, vae = (_random_part(kind, name, changes) for kind, name in ((UNet2DConditionModel, "unet"),
                                                                      (AutoencoderKL, "vae")))
    for tensor in [*unet.parameters(), *vae.parameters()] if in_range else ():
        if tensor.ndim > 1:
            torch.nn.init.normal_(tensor, 0, tensor[0].numel() ** -0.5)
    text = CLIPTextConfig.from_pretrained(SD15_CONFIGS / "text_encoder", **changes.get("text_encoder", {}))
    nothing: Any = None
    scheduler: Any = PNDMScheduler.from_pretrained(SD15_CONFIGS / "scheduler")
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), unet=unet, scheduler=scheduler,
        tokenizer=CLIPTokenizer.from_pretrained(SD15_CONFIGS / "tokenizer"), safety_checker=nothing,
        feature_extractor=nothing, requires_safety_checker=False).save_pretrained(folder)
    return folder


def _random_part(kind: Any, name: str, changes: dict[str, dict[str, Any]]) -> Any:
    return kind.from_config({**kind.load_config(SD15_CONFIGS, subfolder=name), **changes.get(name, {})})


def open_target(size: str, folder: Path, dtype: Any) -> tuple[Model, RunConfig]:
    """The target of a size in `SIZES`, random weights written to `folder`, and the preset that suits it."""
    if size == "figures":
        return find_model(TargetConfig(source="figures", dtype=dtype)), figures()
    path = random_target(folder / "target", NARROW if size == "tiny" else {})
    config = sd15(str(path), "prompts.txt")
    if size == "tiny":
        small = config.sampler.model_copy(update={"width": 64, "height": 96, "steps": 3})
        config = config.model_copy(update={"sampler": small})
    return find_model(TargetConfig(source=str(path), dtype=dtype)), config


def some_prompts(count: int) -> list[str]:
    """Captions of the figures setting, which any tokenizer reads."""
    return figures_prompts("validation", count, seed=0)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """--size, --device, --dtype, --clock and --threads."""
    parser.add_argument("--size", choices=SIZES, default="figures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall",
                        help="cpu: processor seconds of this process, for a machine that others use too")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")


def clock_of(options: argparse.Namespace) -> Callable[[], float]:
    """The clock of the options; sets --threads too."""
    if options.threads:
        torch.set_num_threads(options.threads)
    read = time.process_time if options.clock == "cpu" else time.perf_counter

    def now() -> float:
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        return read()

    return now


def dense_rate(device: str, dtype: str, now: Callable[[], float]) -> float:
    """Floating point operations a second of large square products in that precision: the best of several."""
    side, repeats = (8192, 20) if device.startswith("cuda") else (2048, 4)
    a = torch.randn((side, side), device=device, dtype=DTYPES[dtype])
    rates = []
    for _ in range(4):
        start = now()
        for _ in range(repeats):
            torch.mm(a, a)
        rates.append(2 * side**3 * repeats / (now() - start))
    return max(rates)


def describe(options: argparse.Namespace) -> str:
    """Size, device, precision, threads, clock and versions, for the line above a table."""
    device = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else options.device
    return (f"{options.size}, {device}, {options.dtype}, {torch.get_num_threads()} threads, {options.clock} clock, "
            f"torch {torch.__version__}")
