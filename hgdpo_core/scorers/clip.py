"""CLIP score (Hessel et al. 2021, arXiv:2104.08718, without its factor 2.5): cosine(text, image) of a plain CLIP.

The checkpoint is OpenAI's ViT-L/14 (`openai/clip-vit-large-patch14`) unless the source names another.
"""

from pathlib import Path

import torch

from hgdpo_core.errors import ModelError
from hgdpo_core.scorers import towers, weights
from hgdpo_core.scorers.pixels import crop_pixels
from hgdpo_core.scorers.towers import MODEL_FILES, OPENAI_CLIP, TOKENIZER_FILES, ClipScorer

NAME, TITLE = "clip", "CLIP"


def locate(source: str | None) -> tuple[list[Path], list[Path], str]:
    """Model files (config and weights, or one file of OpenAI's tensors), tokenizer files, fingerprint."""
    path = weights.local_path(source)
    if path is None:
        model = weights.download_files(source or OPENAI_CLIP, MODEL_FILES[0], "its model",
                                       "into a folder and give that as the scorer's source")
    else:
        model = [path] if path.is_file() else weights.all_of(path, MODEL_FILES)
        if not model:
            raise ModelError(f"{path} lacks {' or '.join(MODEL_FILES[0])}: put those of {OPENAI_CLIP} there")
    tokenizer = weights.find_files("the CLIP tokenizer", source, model[0], TOKENIZER_FILES, OPENAI_CLIP)
    return model, tokenizer, weights.fingerprint(NAME, [*model, *tokenizer])


def check(source: str | None) -> None:
    """ModelError where headers and tokenizer show that the files are no whole CLIP; no network is loaded."""
    files, tokenizer_files, _ = locate(source)
    tokenizer = towers.load_tokenizer(tokenizer_files)
    if len(files) == 1:
        towers.check_convert(files[0], tokenizer, act="quick_gelu")
    else:
        towers.check_texts(tokenizer_files[0].parent, tokenizer, towers.check_folder(files[0].parent).text_config)


def load(*, source: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ClipScorer:
    """CLIP from the hub (None), a hub id, a folder, or a file with the tensors of OpenAI's own release."""
    files, tokenizer_files, fingerprint = locate(source)
    tokenizer = towers.load_tokenizer(tokenizer_files)
    if len(files) == 1:
        model = towers.convert(files[0], tokenizer, act="quick_gelu", dtype=dtype)
    else:
        model = towers.load_folder(files[0].parent, dtype)
        towers.check_texts(tokenizer_files[0].parent, tokenizer, model.config.text_config)
    return ClipScorer(NAME, weights.freeze(model, device), tokenizer, crop_pixels, fingerprint)
