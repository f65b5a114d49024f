"""Tiny random models of the real architectures: a Stable Diffusion pipeline and a PickScore-shaped CLIP."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from hgdpo_core.config import TargetConfig
from hgdpo_core.models import Model, find_model, load_backbone, load_pipeline
from hgdpo_core.models.ddpm import DdpmSchedule
from hgdpo_core.models.files import SD15_CONFIGS
from hgdpo_core.models.lora import add_lora, save_lora
from hgdpo_core.models.sd15 import UnetDenoiser
from hgdpo_core.models.text_encoder import TextEncoder

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
        "prediction_type": "epsilon"}
TEXTS = ["a woman in a red top", "a man in a blue top", "a girl with black hair waves", "a boy runs on the beach"]


def tiny_unet() -> UNet2DConditionModel:
    """Random weights, the same at every call; latents of 8x8, text embeddings of width 32."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).eval()


def trainable(unet: UNet2DConditionModel, schedule: Mapping[str, Any]) -> tuple[UnetDenoiser, DdpmSchedule]:
    """What a trainer takes of a backbone."""
    return UnetDenoiser(unet), DdpmSchedule(schedule)


def save_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer with a trained BPE of a few dozen merges."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, end_of_word_suffix="</w>",
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator(TEXTS * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    tokenizer = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=24)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_target(folder: Path, *, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """A diffusers folder with random weights: 32x32 pixels, latents 4x4 (f=8)."""
    torch.manual_seed(seed)
    tokenizer = save_tokenizer(folder / "tokenizer")
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8)
    vae = AutoencoderKL(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                              steps_offset=1, prediction_type=prediction_type)
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    return folder


def text_encoder(model: Model) -> TextEncoder:
    """The text encoder of a model of the SD 1.5 family."""
    pipeline = cast(Any, load_pipeline(model))
    return TextEncoder(pipeline.text_encoder, pipeline.tokenizer, model)


def save_sdxl(folder: Path, *, seed: int = 0, **scheduler: Any) -> Path:
    """A Stable Diffusion XL folder with random weights, narrow, in its block structure: 32x32 pixels, latents 4x4."""
    torch.manual_seed(seed)
    tokenizer, second = (save_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2"))
    second.pad_token = "!"
    encoders = {}
    for name, kind, width in (("text_encoder", CLIPTextModel, 32), ("text_encoder_2", CLIPTextModelWithProjection, 48)):
        encoders[name] = kind(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=24, projection_dim=40, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, hidden_act="gelu"))
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(32, 64, 64), layers_per_block=2, cross_attention_dim=80, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 40)
    vae = AutoencoderKL(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
                        scaling_factor=0.13025, down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4)
    chain = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                   timestep_spacing="leading", **scheduler)
    StableDiffusionXLPipeline(vae=vae, tokenizer=tokenizer, tokenizer_2=second, unet=unet, scheduler=chain,
                              add_watermarker=False, **encoders).save_pretrained(folder)
    return folder


def sd15_shaped(folder: Path, *, seed: int = 0) -> StableDiffusionPipeline:
    """Random weights in the block structure of SD 1.5 (its key names), but narrow: latents 4x4 for 32x32 pixels."""
    torch.manual_seed(seed)
    tokenizer = save_tokenizer(folder / "tokenizer")
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    unet = UNet2DConditionModel(sample_size=4, block_out_channels=(32, 32, 64, 64), layers_per_block=2,
                                cross_attention_dim=32, norm_num_groups=8, attention_head_dim=4)
    vae = AutoencoderKL(block_out_channels=(8, 8, 16, 16), layers_per_block=2, norm_num_groups=4, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
        scheduler=PNDMScheduler(**SD15, skip_prk_steps=True, steps_offset=1))


def save_wide_target(folder: Path) -> Path:
    """A diffusers folder with SD 1.5's own UNet, random; its text encoder is as wide and as long, but of one layer."""
    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder / "tokenizer")
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=64, num_hidden_layers=1, num_attention_heads=12,
        max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    small = sd15_shaped(folder / "small")
    StableDiffusionPipeline(
        vae=small.vae, text_encoder=text, tokenizer=tokenizer, scheduler=small.scheduler, safety_checker=None,
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SD15_CONFIGS / "unet")),
        feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    return folder


def save_judge(folder: Path, *, seed: int = 0) -> Path:
    """A CLIPModel folder with its processor, random weights, 32x32 pixels."""
    torch.manual_seed(seed)
    tokenizer = save_tokenizer(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}
    config = CLIPConfig(
        text_config={"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "max_position_embeddings": 24, **ids},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_random_lora(folder: Path, target_folder: Path) -> Path:
    """A LoRA of a target folder that does something."""
    unet: Any = load_backbone(find_model(TargetConfig(source=str(target_folder), dtype="float32"))).denoiser.network
    add_lora(unet, 4, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    save_lora(unet, folder)
    return folder
