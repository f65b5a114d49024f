"""A judge that loves a warm tint: PickScore plus a stated fondness, for the ablations' tinted world ONLY.

Real preference models like some colours better than others, and a model tuned by them drifts that way: the colour
shift of arXiv:2405.20216v1 (Figure 4, Table 2). The figures judge has no such taste, so nothing there can show what
the statistic matching loss is for. This scorer gives the world that taste openly:

    tinted = PickScore + STRENGTH * warmth,    warmth = mean over all pixels of (red - blue) / 255, in [-1, 1]

STRENGTH is in PickScore points a unit of warmth: an image whose red stands 2.55 levels of 255 higher above its blue
gains STRENGTH / 100 points. In a pool of figures the fondness then spreads the scores over half as far as the judge
itself does (prompts name most colours, so the images of one differ little), and winners stand 5.5 levels of red above
blue over their losers, where the judge alone leaves 0.5 the other way. Whatever is ranked by it says so: its name
stands in file names, tables and labels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from hgdpo_core.config import content_hash
from hgdpo_core.scorers import pickscore

NAME, TITLE = "tinted", "PickScore with a fondness for warm tints (made up to study colour shift)"
STRENGTH = 50.0


class Tinted:
    """A loaded PickScore-shaped judge with a fondness for warm pictures."""

    name = NAME

    def __init__(self, judge: pickscore.PickScore, fingerprint: str):
        self.judge, self.fingerprint = judge, fingerprint

    def score(self, images: Sequence[Image.Image] | np.ndarray | torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """PickScore + STRENGTH * warmth, float32 [B] on the CPU."""
        return self.judge.score(images, prompts) + STRENGTH * warmth(images)

    def embed_images(self, images: Sequence[Image.Image] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """The judge's own features, without the fondness: L2-normalised float32 [B, D]."""
        return self.judge.embed_images(images)


def warmth(images: Sequence[Image.Image] | np.ndarray | torch.Tensor) -> torch.Tensor:
    """Mean of (red - blue) / 255 over an image's pixels, float32 [B] in [-1, 1]; above 0 is warm.

    Images are PIL, or uint8 [B, H, W, 3].
    """
    pictures = [np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image) for image in images]
    return torch.tensor([(picture[..., 0].mean() - picture[..., 2].mean()) / 255 for picture in pictures],
                        dtype=torch.float32)


def locate(source: str | None) -> tuple[str]:
    """The fingerprint: of the judge below and of the fondness."""
    return (content_hash({"judge": pickscore.locate(source)[-1], "strength": STRENGTH, "taste": "red - blue"}, 64),)


def check(source: str | None) -> None:
    """ModelError where headers and tokenizer show that the judge below is not whole."""
    pickscore.check(source)


def load(*, source: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tinted:
    """PickScore from `source` (see there), made fond of warm pictures."""
    return Tinted(pickscore.load(source=source, device=device, dtype=dtype), locate(source)[-1])
