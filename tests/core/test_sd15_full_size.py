"""The exact Stable Diffusion 1.5 with random weights, at the paper's size, on a CPU: minutes and 17 GiB of memory.

In bfloat16 where the CPU multiplies it: one that emulates it takes hours, so there it is float32.

    pytest -m slow -k full_size --log-cli-level=INFO tests/core/test_sd15_full_size.py

All but the SFT step (`-k "full_size and not sft"`) need a third of that. What was seen stands in docs/BENCHMARKS.md.
"""

import math
from pathlib import Path

import ldm
import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from full_size import measured
from PIL import Image
from safetensors import safe_open
from tiny import trainable
from training_cases import train_dpo, train_sft
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hgdpo_core.config import PoolConfig, SamplerConfig, TargetConfig
from hgdpo_core.config.presets import sd15
from hgdpo_core.devices import cpu_has_fast_bfloat16, resolve_dtype
from hgdpo_core.image_sets import read_image_set
from hgdpo_core.images import decode_image
from hgdpo_core.models import Conditioning, Model, find_model, load_pipeline
from hgdpo_core.models.files import SD15_CONFIGS
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.image_latents import ImageLatentStage, image_latent_folder
from hgdpo_core.stages.pool import plan_pool
from hgdpo_core.storage import Store
from hgdpo_core.training.data import LatentImages, PairBatch, epoch_order

PRECISION = "bf16" if cpu_has_fast_bfloat16() else "no"


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
def location(tmp_path_factory) -> Path:
    location = tmp_path_factory.mktemp("full-size")
    pipeline = random_sd15()
    pipeline.save_pretrained(location / "folder")
    ldm.save_single_file(pipeline, location / "single.safetensors")
    return location


@pytest.fixture(scope="module")
def model(location) -> Model:
    return find_model(TargetConfig(source=str(location / "single.safetensors"), dtype=resolve_dtype("auto")))


@pytest.fixture(scope="module")
def image_latents(location, model, tmp_path_factory) -> LatentImages:
    """One photo of another size and aspect, as SFT reads it."""
    folder = tmp_path_factory.mktemp("photos")
    gradient = np.linspace(0, 255, 1333 * 900 * 3).reshape(1333, 900, 3).astype(np.uint8)
    Image.fromarray(gradient).save(folder / "photo.jpg")
    (folder / "photo.txt").write_text("a woman on a beach, full body")
    images = read_image_set(str(folder))
    latents = image_latent_folder(Store(str(folder / "root")), images, model, (704, 1024))
    with measured("latents and text of one 704x1024 image, VAE in float32"):
        assert ImageLatentStage(images, latents, model).make(Worker("cpu")) == 1
    return LatentImages(latents, [0])


class Pairs:
    """A photo against its mirror image, again and again."""

    def __init__(self, image_latents: LatentImages):
        image = image_latents.batch([0])
        self._batch = PairBatch(image.latents, image.latents.flip(-1), image.prompt_embeds)

    def __len__(self) -> int:
        return 1

    def order(self, seed: int, epoch: int) -> list[int]:
        return epoch_order(1, seed, epoch)

    def batch(self, indices) -> PairBatch:
        assert list(indices) == [0]
        return self._batch


@pytest.mark.slow
def test_full_size_single_file_holds_the_folders_weights(location):
    """With the package's own configs, and no network."""
    with measured("single file found and loaded in bfloat16"):
        target = TargetConfig(source=str(location / "single.safetensors"), dtype="bfloat16")
        pipeline = load_pipeline(find_model(target))
    compared = 0
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                       ("text_encoder", "model")):
        state = {name.removeprefix("text_model."): tensor
                 for name, tensor in getattr(pipeline, part).state_dict().items()}
        with safe_open(location / "folder" / part / f"{name}.safetensors", "pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                assert torch.equal(file.get_tensor(key), state[key.removeprefix("text_model.")]), key
                compared += 1
    assert compared == 686 + 248 + 196
    assert pipeline.tokenizer("a cat").input_ids == [49406, 320, 2368, 49407]


@pytest.mark.slow
def test_full_size_pool_image(model, tmp_path):
    """One image of 704x1024 in 2 steps with guidance, decoded and stored, as a pool draws it."""
    plan = plan_pool(Store(str(tmp_path)), model, SamplerConfig(width=704, height=1024, steps=2, guidance_scale=5.0),
                     PoolConfig(images_per_prompt=1, prompts_per_shard=1), ["a woman on a beach, full body"])
    with measured(f"one 704x1024 image of 2 steps with guidance in {model.dtype}, decoded and stored"):
        assert plan.make(Worker()) == 1
    row = plan.folder.read(0).to_pylist()[0]
    image = decode_image(row["image"])
    assert image.size == (704, 1024) == (row["width"], row["height"])
    assert np.asarray(image).std() > 10


@pytest.mark.slow
def test_full_size_dpo_step(model, image_latents):
    """One pair through policy and reference, a step of the LoRA, with gradient checkpointing."""
    pipeline = load_pipeline(model, dtype="float32")
    config = sd15("target", "prompts.txt").dpo.model_copy(
        update={"max_steps": 1, "batch_size": 1, "gradient_checkpointing": True, "mixed_precision": PRECISION})
    with measured(f"one DPO step, one 704x1024 pair, mixed precision {PRECISION}, gradient checkpointing"):
        result = train_dpo(*trainable(pipeline.unet, pipeline.scheduler.config), Pairs(image_latents), config)
    assert result.log[0]["dpo_loss"] == pytest.approx(math.log(2))  # policy and reference are still one
    trained = {name: value for name, value in pipeline.unet.named_parameters() if value.requires_grad}
    assert len(trained) == 256 and all("lora" in name for name in trained)
    assert any(bool(value.any()) for name, value in trained.items() if "lora_B" in name)


@pytest.mark.slow
def test_full_size_sft_step(model, image_latents):
    """One image through the whole UNet and a step of all its weights, as the preset trains: about 17 GiB."""
    pipeline = load_pipeline(model, dtype="float32")
    unet, schedule = pipeline.unet, pipeline.scheduler.config
    empty = image_latents.batch([0]).prompt_embeds
    del pipeline
    before = unet.conv_in.weight.detach().clone()
    config = sd15("target", "prompts.txt").sft.model_copy(
        update={"max_steps": 1, "batch_size": 1, "warmup_steps": 0, "mixed_precision": PRECISION})
    with measured(f"one SFT step, one 704x1024 image, mixed precision {PRECISION}, gradient checkpointing, AdamW"):
        result = train_sft(*trainable(unet, schedule), image_latents, config, Conditioning(empty))
    assert 0 < result.log[0]["loss"] < 100 and math.isfinite(result.log[0]["grad_norm"])
    moved = (unet.conv_in.weight.detach() - before).abs()
    assert moved.max() <= 1.01e-5 and (moved > 0).float().mean() > 0.9  # Adam's first step is the learning rate
