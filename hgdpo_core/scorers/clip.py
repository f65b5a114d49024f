"""CLIP score (Hessel et al. 2021, arXiv:2104.08718, without its factor 2.5): cosine(text, image) of a plain CLIP.

The checkpoint is OpenAI's ViT-L/14 (`openai/clip-vit-large-patch14`) unless the source names another.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from hgdpo_core.errors import ModelError
from hgdpo_core.scorers.pictures import Images, check_counts, crop_pixels
from hgdpo_core.scorers.towers import (
    MODEL_FILES,
    OPENAI_CLIP,
    TOKENIZER_FILES,
    ClipTowers,
    check_convert,
    check_folder,
    check_texts,
    convert,
    load_folder,
    load_tokenizer,
)
from hgdpo_core.scorers.weights import (
    all_of,
    beside,
    download_files,
    find_files,
    fingerprint,
    freeze,
    local_place,
    read_tensors,
)

NAME, TITLE = "clip", "CLIP"


class ClipScore:
    """A loaded CLIP as a judge."""

    name = NAME

    def __init__(self, towers: ClipTowers, fingerprint: str):
        self.towers, self.fingerprint = towers, fingerprint

    def score(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        """Cosines, float32 [B] on the CPU, about 0.15 to 0.35 for OpenAI's weights."""
        check_counts(images, prompts)
        return (self.towers.texts(prompts) * self.embed_images(images)).sum(dim=-1).cpu()

    def embed_images(self, images: Images) -> torch.Tensor:
        """L2-normalised float32 [B, D]."""
        return self.towers.pictures(crop_pixels(images, self.towers.image_size))


def locate(source: str | None) -> tuple[list[Path], list[Path], str]:
    """Model files (config and weights, or one file of OpenAI's tensors), tokenizer files, fingerprint."""
    place = local_place("clip", source)
    if place is None:
        model = download_files("clip", source or OPENAI_CLIP, MODEL_FILES[0], "needs its model",
                               "into a folder and give that as the scorer's source")
    elif place.is_file():
        model = [place]
    else:
        model = all_of(place, MODEL_FILES)
        if not model:
            raise ModelError(f"scorer clip: {place} lacks {' or '.join(MODEL_FILES[0])}: put those of {OPENAI_CLIP} "
                             "there")
    folder = beside("clip", source, model[0])
    tokenizer = find_files("clip", "the CLIP tokenizer", folder, TOKENIZER_FILES, OPENAI_CLIP)
    return model, tokenizer, fingerprint("clip", [*model, *tokenizer])


def check(source: str | None) -> None:
    """ModelError where headers and tokenizer show that the files are no whole CLIP; no network is loaded."""
    files, tokenizer_files, _ = locate(source)
    tokenizer = load_tokenizer("clip", tokenizer_files)
    if len(files) == 1:
        check_convert("clip", files[0], tokenizer, act="quick_gelu")
    else:
        check_texts("clip", tokenizer_files[0].parent, tokenizer, check_folder("clip", files[0].parent).text_config)


def load(*, source: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ClipScore:
    """CLIP from the hub (None), a hub id, a folder, or a file with the tensors of OpenAI's own release."""
    files, tokenizer_files, mark = locate(source)
    tokenizer = load_tokenizer("clip", tokenizer_files)
    if len(files) == 1:
        model = convert("clip", files[0], read_tensors("clip", files[0]), tokenizer, act="quick_gelu", dtype=dtype)
    else:
        model = load_folder("clip", files[0].parent, dtype)
    check_texts("clip", tokenizer_files[0].parent, tokenizer, model.config.text_config)
    return ClipScore(ClipTowers(freeze(model, device), tokenizer), mark)
