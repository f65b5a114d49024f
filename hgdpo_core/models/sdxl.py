"""The Stable Diffusion XL family: a UNet that reads two text encoders, a pooled embedding and sizes; from diffusers."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from hgdpo_core.config import PromptSyntax
from hgdpo_core.errors import ConfigError
from hgdpo_core.models.backbone import SIZES, Backbone, Conditioning
from hgdpo_core.models.ddpm import DdpmSchedule
from hgdpo_core.models.lora import save_lora
from hgdpo_core.models.model import Model, PipelineKind, check_lora_of, load_pipeline
from hgdpo_core.models.sd15 import KlCodec, UnetDenoiser, save_pipeline
from hgdpo_core.models.sdxl_files import CONFIGS, PIPELINE, check_files, is_single_file, schedule_of_keys
from hgdpo_core.models.text_encoder import TextEncoder
from hgdpo_core.models.weight_files import read_config

logger = logging.getLogger(__name__)

TEXT_PARTS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
SDXL = PipelineKind("Stable Diffusion XL", StableDiffusionXLPipeline, CONFIGS, check_files, {"add_watermarker": False},
                    TEXT_PARTS)


class SdxlDenoiser(UnetDenoiser):
    """A UNet that also reads pooled embeddings and sizes."""

    reads_sizes = original_names = True

    def __init__(self, network: Any, factor: int):
        """`factor`: pixels per side of a latent pixel."""
        super().__init__(network)
        self.factor = factor
        self._generated: dict[Any, torch.Tensor] = {}

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        self.mark_length(conditioning)
        embeds = conditioning.embeds
        sizes = conditioning.extra.get(SIZES)
        sizes = self._generated_sizes(noisy, embeds) if sizes is None else sizes.to(embeds.device, embeds.dtype)
        added = {"text_embeds": conditioning.pooled, "time_ids": sizes}
        return self.network(noisy, timesteps, encoder_hidden_states=embeds, encoder_attention_mask=conditioning.mask,
                            added_cond_kwargs=added, return_dict=False)[0]


    def _generated_sizes(self, latents: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[B, 6] for latents [B, C, h, w] of images that are generated, as diffusers' pipeline gives them."""
        height, width = (side * self.factor for side in latents.shape[2:])
        key = (height, width, like.device, like.dtype)
        if key not in self._generated:  # once: each copy to a GPU would be a wait in every step
            self._generated[key] = torch.tensor([[height, width, 0, 0, height, width]], device=like.device,
                                                dtype=like.dtype)
        return self._generated[key].expand(len(latents), 6)


def penultimate(encoder: Any, ids: torch.Tensor, clip_skip: int | None) -> torch.Tensor:
    """Hidden states [B, L, D] before the encoder's last layer, not normed; `clip_skip` skips more, as in diffusers.

    ConfigError where it leaves none.
    """
    layers = encoder.config.num_hidden_layers
    if clip_skip is not None and clip_skip >= layers:
        raise ConfigError(f"target.clip_skip is {clip_skip}, but a text encoder of this model has {layers} layers, of "
                          "which SDXL leaves out the last one anyway: skip fewer")
    return encoder(ids, output_hidden_states=True).hidden_states[-(2 + (clip_skip or 0))]


class SdxlText:
    """Both text encoders of a pipeline under a target's settings.

    Embeddings are theirs side by side. The pooled embedding is the second encoder's of a prompt's first chunk, without
    weights, as A1111 and ComfyUI have it. With an empty negative prompt, a model whose config says so
    (`force_zeros_for_empty_prompt`, as SDXL's own does) has zeros for it, as in diffusers and A1111.
    """

    def __init__(self, pipeline: StableDiffusionXLPipeline, model: Model):
        self._pipeline: Any = pipeline
        self._model = model
        parts = self._pipeline.components
        self.chunk_length: int = parts["tokenizer"].model_max_length
        self.width: int = sum(parts[name].config.hidden_size for name in TEXT_PARTS)
        self.pooled_width: int | None = parts["text_encoder_2"].config.projection_dim

    @cached_property
    def readers(self) -> list[TextEncoder]:
        """Made when prompts are read: they embed the negative prompt, which captions do not need."""
        parts = self._pipeline.components
        return [TextEncoder(parts[name], parts[tokenizer], self._model, penultimate)
                for name, tokenizer in TEXT_PARTS.items()]

    @property
    def _zeros(self) -> bool:
        """Whether the empty text is zeros where guidance leads away from it."""
        return bool(self._pipeline.config.force_zeros_for_empty_prompt)

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        both = zip(*(reader.encode(prompts) for reader in self.readers), strict=True)
        pooled = self._pooled(prompts, self._model.prompt_syntax)
        return [Conditioning(torch.cat(parts, dim=-1)[None], pooled=row[None])
                for parts, row in zip(both, pooled, strict=True)]

    def negative(self, length: int) -> Conditioning:
        embeds = torch.cat([reader.negative(length) for reader in self.readers], dim=-1)
        found = Conditioning(embeds, pooled=self._pooled([self._model.negative_prompt], self._model.negative_syntax))
        return _zero(found) if self._zeros and not self._model.negative_prompt else found

    def encode_captions(self, captions: Sequence[str]) -> Conditioning:
        embeds = torch.cat([reader.encode_plain(captions) for reader in self.readers], dim=-1)
        return Conditioning(embeds, pooled=self._pooled(captions, "plain"))

    def dropped_caption(self) -> Conditioning:
        empty = self.encode_captions([""])
        return _zero(empty) if self._zeros else empty

    def count_cut(self, captions: Sequence[str]) -> int:
        return sum(len(ids) > self.chunk_length for ids in self._pipeline.tokenizer(list(captions)).input_ids)

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        return [self.readers[0].token_ids(prompt) for prompt in prompts]

    def single_token(self, word: str) -> int:
        return self.readers[0].single_token(word)

    def reading(self, syntax: PromptSyntax) -> "SdxlText":
        return SdxlText(self._pipeline, self._model.reading(syntax))

    @torch.no_grad()
    def _pooled(self, texts: Sequence[str], syntax: PromptSyntax) -> torch.Tensor:
        """[B, P]; a pass of its own, for the embeddings of a long prompt are of several chunks.

        Plain texts together, others one by one, as their embeddings are: no text's depends on its neighbours then.
        """
        if not texts:
            return torch.zeros(0, self.pooled_width or 0)
        ids = self.readers[1].first_ids(texts, syntax)
        parts = [ids] if syntax == "plain" else ids.split(1)
        return torch.cat([self._pipeline.text_encoder_2(part).text_embeds for part in parts])


def _zero(text: Conditioning) -> Conditioning:
    return replace(text, embeds=torch.zeros_like(text.embeds),
                   pooled=None if text.pooled is None else torch.zeros_like(text.pooled))


class Sdxl:
    """The family as `FAMILIES` holds it."""

    configs = CONFIGS

    def recognises(self, path: Path) -> bool:
        if path.is_file():
            return is_single_file(path)
        index = path / "model_index.json"
        return index.is_file() and read_config(index).get("_class_name") == PIPELINE

    def check_folder(self, path: Path, *, own_vae: bool) -> None:
        check_files(path, None, own_vae=own_vae)

    def check_file(self, path: Path, configs: Path, *, own_vae: bool) -> None:
        check_files(path, configs, own_vae=own_vae)

    def schedule_of_keys(self, path: Path) -> dict[str, Any]:
        return schedule_of_keys(path)

    def check_lora(self, model: Model, path: Path) -> None:
        check_lora_of(model, path, SDXL)

    def load(self, model: Model, device: str, *, dtype: str | None, codec_dtype: str | None) -> Backbone:
        if codec_dtype is None and (dtype or model.dtype) == "float16" and _overflows(model):
            logger.warning("the VAE of %s overflows in float16: it decodes in float32, which takes longer; a VAE made "
                           "for float16, as target.vae madebyollin/sdxl-vae-fp16-fix, does not need it",
                           model.vae or model.path)
            codec_dtype = "float32"
        loaded: Any = load_pipeline(model, device, dtype=dtype, vae_dtype=codec_dtype, kind=SDXL)
        codec = KlCodec(loaded.vae, loaded.vae_scale_factor, model.vae or model.path)
        return Backbone(denoiser=SdxlDenoiser(loaded.unet, codec.factor), codec=codec, text=SdxlText(loaded, model),
                        schedule=DdpmSchedule(loaded.scheduler.config), save=partial(save_pipeline, loaded),
                        save_lora=partial(save_lora, loaded.unet))


def _overflows(model: Model) -> bool:
    """Whether the VAE's config says that it needs float32; SDXL's own does."""
    folder = model.vae if model.vae is not None else (model.configs or model.path) / "vae"
    config = folder / "config.json"
    return bool(read_config(config).get("force_upcast", True)) if folder.is_dir() and config.exists() else True
