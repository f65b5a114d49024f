"""PickScore (Kirstain et al. 2023, arXiv:2305.01569): exp(logit_scale) * cosine(text, image) of a tuned CLIP ViT-H/14.

Any transformers CLIPModel folder trained with its objective serves, such as the figures judge.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from hgdpo_core.errors import ModelError
from hgdpo_core.fingerprints import fingerprint_path

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
MAX_TOKENS = 77
PROCESSOR_FILES = ["*.json", "*.txt"]


class PickScore:
    """A loaded PickScore-shaped judge."""

    name = "pickscore"

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, processor: CLIPImageProcessorPil,
                 fingerprint: str):
        self.model: Any = model  # transformers' own types do not know what it returns
        self.tokenizer, self.processor, self.fingerprint = tokenizer, processor, fingerprint
        text: Any = model.config.text_config
        self.max_tokens = min(MAX_TOKENS, text.max_position_embeddings)

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image] | np.ndarray | torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Raw PickScore (not a probability), float32 [B] on the CPU. A prompt that repeats is embedded once."""
        if len(images) != len(prompts):
            raise ValueError(f"expected one prompt an image, got {len(images)} images and {len(prompts)} prompts")
        distinct = list(dict.fromkeys(prompts))
        texts = self.embed_texts(distinct)[[distinct.index(prompt) for prompt in prompts]]
        cosine = (texts * self.embed_images(images)).sum(dim=-1)
        return (self.model.logit_scale.float().exp() * cosine).cpu()

    def embed_texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """L2-normalised float32 [B, D]; texts are cut at 77 tokens (or what the model's positions allow)."""
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.max_tokens,
                                return_tensors="pt").to(self.model.device)
        return _normalise(self.model.get_text_features(**tokens).pooler_output)

    def embed_images(self, images: Sequence[Image.Image] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """L2-normalised float32 [B, D]."""
        pictures = [image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)) for image in images]
        pixels = self.processor([picture.convert("RGB") for picture in pictures], return_tensors="pt")["pixel_values"]
        pixels = pixels.to(device=self.model.device, dtype=self.model.dtype)
        return _normalise(self.model.get_image_features(pixel_values=pixels).pooler_output)


def _normalise(embeds: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(embeds.float(), dim=-1)


def locate(source: str | None) -> tuple[Path, Path, str]:
    """Folders of the model and of its processor, and the fingerprint. Downloads a hub id."""
    if source == "figures":
        from hgdpo_core import figures

        source = str(figures.judge_path())
    if source is not None and Path(source).expanduser().is_dir():
        folder = Path(source).expanduser()
        return folder, folder, fingerprint_path(folder)
    if source is not None and source.count("/") != 1:
        raise ModelError(f"scorer pickscore: {source} does not exist: expected a folder with a CLIPModel or a hub id")
    model = _download(source or MODEL, ["*.json", "*.txt", "*.safetensors"])
    processor = _download(PROCESSOR, PROCESSOR_FILES) if source is None else model
    return model, processor, model.name


def _download(repository: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a wide family: all mean "could not be had"
        first = (str(error).splitlines() or [""])[0]
        raise ModelError(f"scorer pickscore: {repository} could not be downloaded ({first}); download it once on a "
                         "machine with network and give its folder as the scorer's source") from None


def load(*, source: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PickScore:
    """PickScore from the hub (None), a hub id, a folder, or "figures"."""
    folder, processor_folder, fingerprint = locate(source)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model = CLIPModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(processor_folder, local_files_only=True)
        processor = CLIPImageProcessorPil.from_pretrained(processor_folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ModelError(f"scorer pickscore: {folder} does not load as a CLIP model: {first}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
    return PickScore(cast(Any, model).to(device).eval().requires_grad_(False), tokenizer, processor, fingerprint)
