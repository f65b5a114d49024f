"""Stable Diffusion XL: images, embeddings and sizes as plain diffusers has them."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline

from hgdpo_core.config import PoolConfig, SamplerConfig, TargetConfig
from hgdpo_core.errors import ConfigError
from hgdpo_core.images import decode_image
from hgdpo_core.models import find_model, load_backbone
from hgdpo_core.models.image_generator import ImageGenerator

PROMPTS = ["a woman in a red top", "a man"]


def plain(folder, dtype=torch.float32):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=dtype, add_watermarker=False)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config,
                                                                 algorithm_type="dpmsolver++")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_no_more_layers_are_skipped_than_there_are(sdxl_folder):
    model = find_model(TargetConfig(source=str(sdxl_folder), dtype="float32", clip_skip=3))
    with pytest.raises(ConfigError, match="clip_skip is 3, but a text encoder of this model has 3 layers"):
        load_backbone(model).text.encode(PROMPTS)


@pytest.mark.parametrize(("settings", "given"), [
    ({}, {}),
    ({"dtype": "bfloat16"}, {}),
    ({"negative_prompt": "a blue man"}, {"negative_prompt": "a blue man"}),
    ({"clip_skip": 1}, {"clip_skip": 1}),
])
def test_an_image_is_plain_diffusers_from_its_seed(sdxl_folder, settings, given):
    model = find_model(TargetConfig(source=str(sdxl_folder), **{"dtype": "float32", **settings}))
    generator = ImageGenerator(model, SamplerConfig(width=32, height=48, steps=3, guidance_scale=4.0),
                               PoolConfig(images_per_prompt=1, batch_size=1), "cpu")  # plain's batch: bf16 rounds by it
    rows = list(generator.generate(PROMPTS))
    pipeline = plain(sdxl_folder, getattr(torch, model.dtype))
    for row in rows:
        noise = torch.randn((1, 4, 6, 4), generator=torch.Generator().manual_seed(row["seed"]))
        image = pipeline(row["prompt"], height=48, width=32, num_inference_steps=3, guidance_scale=4.0,
                         latents=noise.to(pipeline.unet.dtype), output_type="np", **given).images[0]
        expected = (image * 255).round().astype(np.int16)
        difference = np.abs(np.asarray(decode_image(row["image"])).astype(np.int16) - expected)
        assert difference.max() <= 1, difference.max()
