"""HPS v2 (Wu et al. 2023, arXiv:2306.09341): cosine(text, image) of a tuned open_clip ViT-H/14, without its scale.

Two releases whose scores cannot be compared with each other: `hps_v2.0`, which the name "HPS v2" means, and the later
`hps_v2.1`. The whole picture is seen: the published code scales the longer side to 224 and pads with black.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hgdpo_core.scorers.pictures import Images, check_counts, letterbox_pixels
from hgdpo_core.scorers.towers import (
    OPENAI_CLIP,
    TOKENIZER_FILES,
    ClipTowers,
    check_convert,
    check_texts,
    convert,
    load_tokenizer,
)
from hgdpo_core.scorers.weights import beside, find_files, find_weights, fingerprint, freeze, read_tensors

REPOSITORY = "xswu/HPSv2"
HEADS = 16  # of both towers of ViT-H/14
ANTIALIAS = False
"""The original scales a float tensor. torchvision did that without antialiasing until 0.17, so HPS was trained and
published without; a newer torchvision below the same code gives other scores."""


class Hps:
    """A loaded HPS v2."""

    def __init__(self, name: str, towers: ClipTowers, fingerprint: str):
        self.name, self.towers, self.fingerprint = name, towers, fingerprint

    def score(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        """Cosines, float32 [B] on the CPU, about 0.2 to 0.35 for the published weights."""
        check_counts(images, prompts)
        return (self.towers.texts(prompts) * self.embed_images(images)).sum(dim=-1).cpu()

    def embed_images(self, images: Images) -> torch.Tensor:
        """L2-normalised float32 [B, D]."""
        return self.towers.pictures(letterbox_pixels(images, self.towers.image_size, antialias=ANTIALIAS))


@dataclass(frozen=True)
class Release:
    """One released version, as the registry of scorers wants it."""

    NAME: str
    TITLE: str
    stem: str

    def locate(self, source: str | None) -> tuple[Path, list[Path], str]:
        """Weights, tokenizer files, fingerprint. Downloads what is not there."""
        weights = find_weights(self.NAME, source, (f"{self.stem}.safetensors", f"{self.stem}.pt"), REPOSITORY)
        folder = beside(self.NAME, source, weights)
        tokenizer = find_files(self.NAME, "the CLIP tokenizer", folder, TOKENIZER_FILES, OPENAI_CLIP)
        return weights, tokenizer, fingerprint(self.NAME, [weights, *tokenizer], antialias=ANTIALIAS)

    def check(self, source: str | None) -> None:
        """ModelError where header and tokenizer show that the file is no whole HPS; no network is loaded."""
        path, tokenizer_files, _ = self.locate(source)
        check_convert(self.NAME, path, load_tokenizer(self.NAME, tokenizer_files), act="gelu", heads=HEADS)

    def load(self, *, source: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Hps:
        """HPS from the hub (None), a hub id, a folder or a file with open_clip's tensors."""
        path, tokenizer_files, mark = self.locate(source)
        tokenizer = load_tokenizer(self.NAME, tokenizer_files)
        model = convert(self.NAME, path, read_tensors(self.NAME, path), tokenizer, act="gelu", vision_heads=HEADS,
                        text_heads=HEADS, dtype=dtype)
        check_texts(self.NAME, path, tokenizer, model.config.text_config)
        return Hps(self.NAME, ClipTowers(freeze(model, device), tokenizer), mark)


V20 = Release("hps_v2.0", "HPS v2.0", "HPS_v2_compressed")
V21 = Release("hps_v2.1", "HPS v2.1", "HPS_v2.1_compressed")
