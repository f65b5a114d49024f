"""A LoRA of Stable Diffusion XL: merged as unmerged, and by the names that ComfyUI and A1111 look up."""

import json
import re
from collections.abc import Iterator

import numpy as np
import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from hgdpo_core.config import PoolConfig, SamplerConfig, TargetConfig
from hgdpo_core.images import decode_image
from hgdpo_core.models import find_model, load_backbone
from hgdpo_core.models.files import LORA_NAME
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.models.lora import add_lora, save_lora, write_kohya_lora
from hgdpo_core.models.networks import empty_network
from hgdpo_core.models.sdxl_files import CONFIGS

PROMPT, WEIGHT, SIZE = "a woman in a red top", 0.5, (32, 48)
SAMPLER = SamplerConfig(width=SIZE[0], height=SIZE[1], steps=3, guidance_scale=4.0)


# -- images


@pytest.fixture(scope="module")
def lora(tmp_path_factory, sdxl_folder):
    return tiny.save_random_lora(tmp_path_factory.mktemp("lora"), sdxl_folder)


def generated(model):
    """Pixels of the one image of PROMPT, and its seed."""
    generator = ImageGenerator(model, SAMPLER, PoolConfig(images_per_prompt=1, batch_size=1), "cpu")
    (row,) = generator.generate([PROMPT])
    return np.asarray(decode_image(row["image"])).astype(int), row["seed"]


def plain(pipeline, seed):
    """The same by diffusers alone, whatever its LoRA is."""
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config,
                                                                 algorithm_type="dpmsolver++")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 4, SIZE[1] // 8, SIZE[0] // 8), generator=torch.Generator().manual_seed(seed))
    image = pipeline(PROMPT, width=SIZE[0], height=SIZE[1], num_inference_steps=3, guidance_scale=4.0, latents=noise,
                     output_type="np").images[0]
    return (image * 255).round().astype(int)


def test_merged_images_are_unmerged_ones(sdxl_folder, lora, tmp_path):
    """Ours has the LoRA in its weights; diffusers beside them; the fused export, which diffusers opens, in them too."""
    model = find_model(TargetConfig(source=str(sdxl_folder), dtype="float32"))
    merged, seed = generated(model.with_lora(lora, WEIGHT))
    base, base_seed = generated(model)
    assert seed == base_seed and np.abs(merged - base).max() > 10  # it does something
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    pipeline.load_lora_weights(str(lora), adapter_name="hgdpo")
    pipeline.set_adapters(["hgdpo"], [WEIGHT])
    assert np.abs(plain(pipeline, seed) - merged).max() <= 1
    load_backbone(model.with_lora(lora, WEIGHT)).save(tmp_path / "fused")
    fused = StableDiffusionXLPipeline.from_pretrained(tmp_path / "fused", add_watermarker=False)
    assert np.abs(plain(fused, seed) - merged).max() <= 1
    again, _ = generated(find_model(TargetConfig(source=str(tmp_path / "fused"), dtype="float32", family="sdxl")))
    assert np.abs(again - merged).max() <= 1


# -- names, by the original architecture at its full size


def original_attention() -> Iterator[tuple[str, int, int]]:
    """Of each attention layer in the order of a forward pass: name, width, width of what keys and values read.

    As sd_xl_base.yaml of Stability's generative-models describes the UNet: model_channels 320, channel_mult 1 2 4,
    num_res_blocks 2, attention_resolutions 4 2, transformer_depth 1 2 10, context_dim 2048. `input_blocks` and
    `output_blocks` are flat lists with one entry per residual block, the first convolution and each downsampling being
    entries of `input_blocks`; a residual block is an entry's 0, its transformer the 1.
    """
    depths, text = {0: 0, 1: 2, 2: 10}, 2048  # at full resolution there is no attention

    def transformer(name: str, level: int) -> Iterator[tuple[str, int, int]]:
        width = 320 * (1, 2, 4)[level]
        for block in range(depths[level]):
            for number, reads in ((1, width), (2, text)):
                yield f"{name}.transformer_blocks.{block}.attn{number}", width, reads

    entry = 1
    for level in (0, 1, 2):
        for _ in range(2):
            yield from transformer(f"input_blocks.{entry}.1", level)
            entry += 1
        entry += 1  # downsampling; after the last level there is none, nor a further entry
    yield from transformer("middle_block.1", 2)
    for entry in range(9):  # one residual block more than on the way down
        yield from transformer(f"output_blocks.{entry}.1", 2 - entry // 3)


def forward_order(name: str) -> tuple[int | str, ...]:
    """Where a layer of diffusers' UNet comes in its forward pass."""
    side = ("down_blocks", "mid_block", "up_blocks").index(name.partition(".")[0])
    return side, *map(int, re.findall(r"\d+", name.rpartition(".to_")[0])), name


def test_other_tools_find_every_layer_of_the_full_model(tmp_path):
    """ComfyUI looks up lora_unet_ and a layer's original name with _ for dots (comfy/lora.py, model_lora_keys_unet);
    A1111 and Forge put diffusion_model for lora_unet and look the layer up among the network's, dots replaced
    (extensions-builtin/Lora/networks.py): one set of names serves all three.
    """
    unet = empty_network(CONFIGS, "unet", json.loads((CONFIGS / "unet" / "config.json").read_text()))
    add_lora(unet, rank=1, seed=0)
    layers = sorted((name for name, module in unet.named_modules() if isinstance(module, LoraLayer)), key=forward_order)
    originals = list(original_attention())
    assert len(layers) == 4 * len(originals) == 560
    for number, name in enumerate(layers):  # which tells a layer from another of its shape
        layer = unet.get_submodule(name)
        for half in (layer.lora_A["default"], layer.lora_B["default"]):
            half.weight = torch.nn.Parameter(torch.full(half.weight.shape, float(number)))  # before, on no device
    save_lora(unet, tmp_path)
    write_kohya_lora(tmp_path / LORA_NAME, tmp_path / "kohya.safetensors", original_names=True)
    state = load_file(tmp_path / "kohya.safetensors")
    assert len(state) == 3 * len(layers)
    kinds = ("to_k", "to_out.0", "to_q", "to_v")
    for place, (name, width, reads) in enumerate(originals):
        for kind in kinds:
            comfy = f"lora_unet_{name}.{kind}".replace(".", "_")
            down, up, alpha = (state.pop(f"{comfy}.{part}") for part in ("lora_down.weight", "lora_up.weight", "alpha"))
            assert down.shape == (1, reads if kind in ("to_k", "to_v") else width) and up.shape == (width, 1)
            assert alpha.item() == 1
            found = layers[int(down[0, 0])]
            assert found.endswith(kind) and int(down[0, 0]) // 4 == place, (comfy, found)
    assert not state  # and nothing that they would skip
