"""The Stable Diffusion 1.x family: UNet, DDPM chain, AutoencoderKL and CLIP, from diffusers."""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from hgdpo_core.config import PromptSyntax
from hgdpo_core.errors import ModelError
from hgdpo_core.models.backbone import Backbone, Conditioning, Decoded, Denoiser
from hgdpo_core.models.ddpm import DdpmSchedule
from hgdpo_core.models.files import SD15_CONFIGS, check_files, read_config
from hgdpo_core.models.lora import ATTENTION_LINEARS, save_lora
from hgdpo_core.models.model import SD15, Model, check_lora_of, load_pipeline
from hgdpo_core.models.sampling import encode_text
from hgdpo_core.models.text_encoder import TextEncoder

logger = logging.getLogger(__name__)

PIPELINE = "StableDiffusionPipeline"
_COPYING = Lock()  # batches may be decoded side by side
SMALL_LATENTS = 32  # pixels per side that a UNet is made for: 1 024 tokens, whose attention scores are megabytes


class UnetDenoiser(Denoiser):
    """A UNet that reads text embeddings alone."""

    lora_targets = ATTENTION_LINEARS

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        self.mark_length(conditioning)
        return self.network(noisy, timesteps, encoder_hidden_states=conditioning.embeds,
                            encoder_attention_mask=conditioning.mask, return_dict=False,
                            **self.adapter_arguments(conditioning))[0]

    def adapter_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        """What a network with a personaliser is given beside the text."""
        return {}

    @contextmanager
    def training_attention(self, *, on_cpu: bool) -> Iterator[None]:
        """On a CPU, plain attention: the fused one's backward takes over half of a small UNet's step there.

        Not for a large one: a pair of 704x1024 pixels has 8 GiB of attention scores, which the fused one never holds.
        """
        before = dict(self.network.attn_processors)
        if on_cpu and (self.network.config.sample_size or math.inf) <= SMALL_LATENTS:
            self.network.set_attn_processor(AttnProcessor())
        try:
            yield
        finally:
            self.network.set_attn_processor(before)


class KlCodec:
    """An AutoencoderKL; latents are scaled by its scaling factor. `path`: the files that it is from, for messages."""

    def __init__(self, vae: Any, factor: int, path: Path):
        self.vae, self.factor, self.path = vae, factor, path
        self.channels: int = vae.config.latent_channels
        self._exact: Any = None

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """scaling_factor * posterior mean, float32 [B, C, h, w] on the CPU, of images [B, 3, H, W] in [-1, 1]."""
        posterior = self.vae.encode(images.to(device=self.vae.device, dtype=self.vae.dtype), return_dict=False)[0]
        return (posterior.mean * self.vae.config.scaling_factor).float().cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> Decoded:
        """Images of scaled latents [B, C, h, w], rounded as diffusers' image processor rounds; see `LatentCodec`."""
        pixels, finite = self._decode(self.vae, latents)
        good_latents, good = torch.stack([_finite_rows(latents), finite]).tolist()  # the batch's only wait
        dtype = str(latents.dtype).removeprefix("torch.")
        if not all(good_latents):
            raise ModelError(f"{self.path} generates images that are not finite in {dtype}: check its weights, or set "
                             "target.dtype to float32")
        again = [row for row, is_good in enumerate(good) if not is_good]
        for row in again:  # one by one: in float32 an image takes twice the memory
            with torch.autocast(latents.device.type, enabled=False):
                pixels[row:row + 1], finite = self._decode(self._in_float32(), latents[row:row + 1])
            if not bool(finite.all()):
                raise ModelError(f"the VAE of {self.path} decodes images that are not finite, also in float32: check "
                                 "its weights, or give another one as target.vae")
        return Decoded(pixels.cpu().numpy(), again)  # transferred as bytes, not floats

    def decode_with_gradient(self, latents: torch.Tensor) -> torch.Tensor:
        if self.vae.dtype == torch.float16:
            raise ModelError(f"gradients through the VAE of {self.path} need it in bfloat16 or float32, not float16")
        self.vae.requires_grad_(False)
        self.vae.enable_gradient_checkpointing()  # block by block, so that only one block's activations live
        return self._decode_images(latents)

    def _decode_images(self, latents: torch.Tensor) -> torch.Tensor:
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return self.vae.decode(scaled, return_dict=False)[0].float()

    def _decode(self, vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [B, H, W, 3], and bool [B]: whether the image is finite."""
        images = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        pixels = (images * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
        return (pixels * 255).round().to(torch.uint8), _finite_rows(images)

    def _in_float32(self) -> Any:
        with _COPYING:
            if self._exact is None:
                logger.warning("the VAE of %s decodes images that are not finite in half precision: such images are "
                               "decoded again in float32", self.path)
                self._exact = copy.deepcopy(self.vae).float()
            return self._exact

    def compile_for_sampling(self) -> None:
        self.vae.to(memory_format=torch.channels_last).decoder.compile(dynamic=False)

    def to(self, device: torch.device | str) -> None:
        nn.Module.to(self.vae, device)


def _finite_rows(batch: torch.Tensor) -> torch.Tensor:
    """bool [B]: whether all numbers of each row of [B, ...] are finite."""
    return torch.isfinite(batch).flatten(1).all(dim=1)


class ClipText:
    """The CLIP text encoder of a pipeline under a target's settings."""

    def __init__(self, pipeline: StableDiffusionPipeline, model: Model):
        self._pipeline: Any = pipeline
        self._model = model
        self.chunk_length: int = self._pipeline.tokenizer.model_max_length
        self.width: int = self._pipeline.text_encoder.config.hidden_size
        self.pooled_width: int | None = None

    @cached_property
    def reader(self) -> TextEncoder:
        """Made when prompts are read: it embeds the negative prompt, which captions do not need."""
        return TextEncoder(self._pipeline.text_encoder, self._pipeline.tokenizer, self._model)

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        return [Conditioning(embeds[None]) for embeds in self.reader.encode(prompts)]

    def negative(self, length: int) -> Conditioning:
        return Conditioning(self.reader.negative(length))

    def encode_captions(self, captions: Sequence[str]) -> Conditioning:
        parts = self._pipeline
        return Conditioning(encode_text(parts.text_encoder, parts.tokenizer, captions, self._model.clip_skip))

    def dropped_caption(self) -> Conditioning:
        return self.encode_captions([""])

    def count_cut(self, captions: Sequence[str]) -> int:
        return sum(len(ids) > self.chunk_length for ids in self._pipeline.tokenizer(list(captions)).input_ids)

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """The token behind each row of each prompt's embedding, as `encode` makes it."""
        return [self.reader.token_ids(prompt) for prompt in prompts]

    def single_token(self, word: str) -> int:
        """The id of a word that is one token; ModelError for one that is more."""
        return self.reader.single_token(word)

    def reading(self, syntax: PromptSyntax) -> "ClipText":
        return ClipText(self._pipeline, self._model.reading(syntax))


class Sd15:
    """The family as `FAMILIES` holds it."""

    configs = SD15_CONFIGS

    def recognises(self, path: Path) -> bool:
        index = path / "model_index.json"
        return index.is_file() and read_config(index).get("_class_name") == PIPELINE

    def check_folder(self, path: Path, *, own_vae: bool) -> None:
        check_files(path, None, own_vae=own_vae)

    def check_file(self, path: Path, configs: Path, *, own_vae: bool) -> None:
        check_files(path, configs, own_vae=own_vae)

    def schedule_of_keys(self, path: Path) -> dict[str, Any]:
        return {}

    def check_lora(self, model: Model, path: Path) -> None:
        check_lora_of(model, path, SD15)

    def load(self, model: Model, device: str, *, dtype: str | None, codec_dtype: str | None) -> Backbone:
        return make_backbone(load_pipeline(model, device, dtype=dtype, vae_dtype=codec_dtype), model)


def make_backbone(pipeline: StableDiffusionPipeline, model: Model) -> Backbone:
    """A loaded pipeline behind the seam; it shares the pipeline's networks."""
    loaded: Any = pipeline
    return Backbone(denoiser=UnetDenoiser(loaded.unet), schedule=DdpmSchedule(loaded.scheduler.config),
                    codec=KlCodec(loaded.vae, loaded.vae_scale_factor, model.vae or model.path),
                    text=ClipText(pipeline, model),
                    save=partial(save_pipeline, loaded), save_lora=partial(save_lora, loaded.unet))


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Write a whole pipeline; its UNet goes to the CPU."""
    pipeline.unet.to("cpu").requires_grad_(False)
    pipeline.save_pretrained(folder, safe_serialization=True)
