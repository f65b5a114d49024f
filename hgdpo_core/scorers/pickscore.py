"""PickScore (Kirstain et al. 2023, arXiv:2305.01569): exp(logit_scale) * cosine(text, image) of a tuned CLIP ViT-H/14.

Any transformers CLIPModel folder trained with its objective serves, such as the built-in one.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import CLIPImageProcessorPil, CLIPTokenizer

from hgdpo_core.built_in import find_scorer_weights, is_built_in
from hgdpo_core.devices import in_own_float32
from hgdpo_core.errors import ModelError, first_line
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.models.hub import quiet_transformers
from hgdpo_core.models.tokenizers import load_clip_tokenizer
from hgdpo_core.scorers.pixels import Images, crop_pixels, crop_tensor, floor_half, normalise_pixels
from hgdpo_core.scorers.towers import ClipScorer, check_folder, check_texts, load_folder, normalise
from hgdpo_core.scorers.weights import freeze

NAME, TITLE = "pickscore", "PickScore"
GIVES_GRADIENT = True
MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
MAX_TOKENS = 77
PROCESSOR_FILES = ["*.json", "*.txt"]


class PickScore(ClipScorer):
    """A loaded PickScore, or another CLIP of its shape."""

    def __init__(self, model: Any, tokenizer: CLIPTokenizer, processor: CLIPImageProcessorPil, fingerprint: str):
        super().__init__(NAME, model, tokenizer, partial(crop_pixels, halve=floor_half), fingerprint)
        self.image_size, self.mean, self.deviation = _read_processor(processor)
        self.max_tokens = min(MAX_TOKENS, self.max_tokens)

    @torch.no_grad()
    def score(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        """Raw PickScore (not a probability), float32 [B] on the CPU. A prompt that repeats is embedded once."""
        return (self.model.logit_scale.float().exp() * self.cosines(images, prompts)).cpu()

    @in_own_float32
    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [B] on the model's device for pixels [B, 3, H, W] in 0..1, with the gradient to the pixels.

        Resized as a tensor, not by PIL, so it differs a little from `score`.
        """
        cropped = crop_tensor(pixels, self.image_size, halve=floor_half)
        values = normalise_pixels(cropped, self.model.dtype, mean=self.mean, deviation=self.deviation)
        images = normalise(self.model.get_image_features(pixel_values=values).pooler_output)
        return self.model.logit_scale.float().exp() * (self.texts(prompts) * images).sum(dim=-1)

    def to(self, device: torch.device | str) -> "PickScore":
        """Move to a device, in place."""
        self.model.to(device)
        return self

    @torch.no_grad()
    @in_own_float32
    def embed_texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """L2-normalised float32 [B, D]; texts are cut at 77 tokens (or what the model's positions allow)."""
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=self.max_tokens,
                                return_tensors="pt").to(self.model.device)
        return normalise(self.model.get_text_features(**tokens).pooler_output)


def _read_processor(processor: Any) -> tuple[int, list[float], list[float]]:
    """Side in pixels, mean and deviation of a CLIP image processor; ModelError for one that does more or less."""
    side = processor.size.get("shortest_edge")
    crop = (processor.crop_size["height"], processor.crop_size["width"])
    steps = (processor.do_resize, processor.do_center_crop, processor.do_rescale, processor.do_normalize)
    if side is None or crop != (side, side) or not all(steps) or processor.resample != 3:
        raise ModelError(f"its preprocessor_config.json asks for {processor.size} and a crop of {crop}: expected "
                         "CLIP's own (bicubic, shortest_edge equal to a square crop)")
    return side, processor.image_mean, processor.image_std


def locate(source: str | None) -> tuple[Path, Path, str]:
    """Folders of the model and of its processor, and the fingerprint. Downloads a hub id."""
    if is_built_in(source):
        source = str(find_scorer_weights(NAME))
    if source is not None and Path(source).expanduser().is_dir():
        folder = Path(source).expanduser()
        return folder, folder, fingerprint_path(folder)
    if source is not None and source.count("/") != 1:
        raise ModelError(f"{source} does not exist: expected a folder with a CLIPModel or a hub id")
    model = _download(source or MODEL, ["*.json", "*.txt", "*.safetensors"])
    processor = _download(PROCESSOR, PROCESSOR_FILES) if source is None else model
    return model, processor, model.name


def _download(repository: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a wide family: all mean "could not be downloaded"
        raise ModelError(f"{repository} could not be downloaded ({first_line(error)}); download it once on a machine "
                         "with network and give its folder as the scorer's source") from None


def check(source: str | None) -> None:
    """ModelError where headers and tokenizer show that the folder is not a whole PickScore; no network is loaded."""
    folder, processor_folder, _ = locate(source)
    text_config = check_folder(folder).text_config
    check_texts(processor_folder, load_clip_tokenizer(processor_folder), text_config)
    _load_processor(processor_folder)


def _load_processor(folder: Path) -> CLIPImageProcessorPil:
    try:
        with quiet_transformers():
            processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        _read_processor(processor)
    except ModelError:
        raise
    except Exception as error:  # any value of any setting may be wrong, and each fails in its own way
        raise ModelError(f"{folder} holds no image processor of a CLIP: {first_line(error)}") from None
    return processor


def load(*, source: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PickScore:
    """PickScore from the hub (None), a hub id, a folder, or the built-in one."""
    folder, processor_folder, fingerprint = locate(source)
    model = load_folder(folder, dtype)
    tokenizer = load_clip_tokenizer(processor_folder)
    check_texts(processor_folder, tokenizer, model.config.text_config)
    return PickScore(freeze(model, device), tokenizer, _load_processor(processor_folder), fingerprint)
