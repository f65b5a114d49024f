"""HPS v2 (Wu et al. 2023, arXiv:2306.09341): cosine(text, image) of a tuned open_clip ViT-H/14, without its scale.

Two releases whose scores cannot be compared with each other: `hps_v2.0`, which the name "HPS v2" means, and the later
`hps_v2.1`. The whole image is seen: the published code scales the longer side to 224 and pads with black.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from hgdpo_core.scorers import towers, weights
from hgdpo_core.scorers.pixels import Images, letterbox_pixels
from hgdpo_core.scorers.towers import OPENAI_CLIP, TOKENIZER_FILES, ClipScorer

REPOSITORY = "xswu/HPSv2"
HEADS = 16  # of both towers of ViT-H/14
ANTIALIAS = False
"""The original scales a float tensor. torchvision did that without antialiasing until 0.17, so HPS was trained and
published without; a newer torchvision below the same code gives other scores."""


def _pixels(images: Images, size: int) -> torch.Tensor:
    return letterbox_pixels(images, size, antialias=ANTIALIAS)


@dataclass(frozen=True)
class Release:
    """One released version, as an entry of `SCORERS`."""

    NAME: str
    TITLE: str
    stem: str

    def locate(self, source: str | None) -> tuple[Path, list[Path], str]:
        """Weights, tokenizer files, fingerprint. Downloads what is not there."""
        path = weights.find_weights(source, (f"{self.stem}.safetensors", f"{self.stem}.pt"), REPOSITORY)
        tokenizer = weights.find_files("the CLIP tokenizer", source, path, TOKENIZER_FILES, OPENAI_CLIP)
        return path, tokenizer, weights.fingerprint(self.NAME, [path, *tokenizer], antialias=ANTIALIAS)

    def check(self, source: str | None) -> None:
        """ModelError where header and tokenizer show that the file is not a whole HPS; no network is loaded."""
        path, tokenizer_files, _ = self.locate(source)
        towers.check_convert(path, towers.load_tokenizer(tokenizer_files), act="gelu", heads=HEADS)

    def load(self, *, source: str | None = None, device: str = "cpu",
             dtype: torch.dtype = torch.float32) -> ClipScorer:
        """HPS from the hub (None), a hub id, a folder or a file with open_clip's tensors."""
        path, tokenizer_files, fingerprint = self.locate(source)
        tokenizer = towers.load_tokenizer(tokenizer_files)
        model = towers.convert(path, tokenizer, act="gelu", heads=HEADS, dtype=dtype)
        return ClipScorer(self.NAME, weights.freeze(model, device), tokenizer, _pixels, fingerprint)


V20 = Release("hps_v2.0", "HPS v2.0", "HPS_v2_compressed")
V21 = Release("hps_v2.1", "HPS v2.1", "HPS_v2.1_compressed")
