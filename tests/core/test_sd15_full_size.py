"""The exact Stable Diffusion 1.5 with random weights, at the paper's size, on a CPU: minutes and about 6 GiB of memory.

    pytest -m slow -k full_size --log-cli-level=INFO tests/core/test_sd15_full_size.py
"""

import logging
import resource
import sys
from pathlib import Path

import ldm
import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hgdpo_core.config import PoolConfig, SamplerConfig, TargetConfig
from hgdpo_core.generate import generate_pool, plan_pool
from hgdpo_core.images import decode_image
from hgdpo_core.models import find_model, load_pipeline
from hgdpo_core.storage import Store
from hgdpo_core.target_files import SD15_CONFIGS


def random_sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 in bfloat16, weights drawn as their fan-in asks, so that activations stay in range."""
    def build(kind, part):
        with init_empty_weights():
            return kind.from_config(kind.load_config(SD15_CONFIGS / part))

    with init_empty_weights():
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(SD15_CONFIGS / "text_encoder"))
    unet, vae = build(UNet2DConditionModel, "unet"), build(AutoencoderKL, "vae")
    generator = torch.Generator().manual_seed(0)
    for part in (unet, vae, text):
        part.to(torch.bfloat16).to_empty(device="cpu")
        for name, tensor in part.state_dict().items():
            if tensor.ndim > 1:
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        for name, tensor in part.named_buffers():  # position ids, which no state dict holds
            if name.endswith("position_ids"):
                tensor.copy_(torch.arange(tensor.shape[-1])[None])
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=CLIPTokenizer.from_pretrained(SD15_CONFIGS / "tokenizer"), unet=unet,
        scheduler=PNDMScheduler.from_pretrained(SD15_CONFIGS / "scheduler"), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("full-size")
    pipeline = random_sd15()
    pipeline.save_pretrained(place / "folder")
    ldm.save_single_file(pipeline, place / "single.safetensors")
    return place


def peak_gib() -> float:
    """The largest memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


@pytest.mark.slow
def test_full_size_single_file_holds_the_folders_weights(place):
    """With the package's own configs, and no network."""
    pipeline = load_pipeline(find_model(TargetConfig(source=str(place / "single.safetensors"), dtype="bfloat16")))
    compared = 0
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                       ("text_encoder", "model")):
        state = {name.removeprefix("text_model."): tensor
                 for name, tensor in getattr(pipeline, part).state_dict().items()}
        with safe_open(place / "folder" / part / f"{name}.safetensors", "pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                assert torch.equal(file.get_tensor(key), state[key.removeprefix("text_model.")]), key
                compared += 1
    assert compared == 686 + 248 + 196
    assert pipeline.tokenizer("a cat").input_ids == [49406, 320, 2368, 49407]
    logging.info("single file loaded, peak memory %.2f GiB", peak_gib())


@pytest.mark.slow
def test_full_size_pool_image(place, tmp_path):
    """One image of 704x1024 in 2 steps with guidance, decoded and stored, as a pool draws it."""
    model = find_model(TargetConfig(source=str(place / "single.safetensors"), dtype="bfloat16"))
    plan = plan_pool(Store(str(tmp_path)), model, SamplerConfig(width=704, height=1024, steps=2, guidance_scale=5.0),
                     PoolConfig(images_per_prompt=1, prompts_per_shard=1), ["a woman on a beach, full body"])
    assert generate_pool(plan) == 1
    row = plan.folder.read(0).to_pylist()[0]
    image = decode_image(row["image"])
    assert image.size == (704, 1024) == (row["width"], row["height"])
    assert np.asarray(image).std() > 10
    seconds = plan.folder.manifests()[0].seconds
    logging.info("704x1024, 2 steps, bfloat16 on the CPU: %.0f s, peak memory %.2f GiB", seconds, peak_gib())
