"""A scorer that prefers warm tints: PickScore plus a stated preference, for the ablations' tinted setting ONLY.

Real preference models like some colours better than others, and a model tuned by them drifts that way: the colour
shift of arXiv:2405.20216v1 (Figure 4, Table 2). The built-in PickScore has no such preference, so nothing there can
show what the statistic matching loss is for. This scorer adds one openly:

    tinted = PickScore + STRENGTH * warmth,    warmth = mean over all pixels of (red - blue) / 255, in [-1, 1]

STRENGTH is in PickScore points per unit of warmth: an image whose red is 2.55 levels of 255 higher above its blue
gains STRENGTH / 100 points. In a pool of figures the preference then spreads the scores over half as far as PickScore
itself does (prompts name most colours, so the images of one differ little), and the red of winners is 5.5 levels more
above blue than that of their losers, where PickScore alone leaves 0.5 the other way. Whatever is ranked by it is marked
so: its name is in file names, tables and labels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from hgdpo_core.config.base import content_hash
from hgdpo_core.devices import Float32
from hgdpo_core.scorers import pickscore
from hgdpo_core.scorers.pixels import Images

NAME, TITLE = "tinted", "PickScore with a fondness for warm tints (made up to study colour shift)"
STRENGTH = 50.0


class Tinted:
    """A loaded PickScore with a preference for warm images."""

    name = NAME

    def __init__(self, base: pickscore.PickScore, fingerprint: str):
        self.base, self.fingerprint = base, fingerprint

    @property
    def float32(self) -> Float32:
        """How the PickScore below computes float32."""
        return self.base.float32

    @float32.setter
    def float32(self, precision: Float32) -> None:
        self.base.float32 = precision

    def score(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        """PickScore + STRENGTH * warmth, float32 [B] on the CPU."""
        return self.base.score(images, prompts) + STRENGTH * warmth(images)

    def embed_images(self, images: Images) -> torch.Tensor:
        """PickScore's own features, without the preference: L2-normalised float32 [B, D]."""
        return self.base.embed_images(images)


def warmth(images: Images) -> torch.Tensor:
    """Mean of (red - blue) / 255 over an image's pixels, float32 [B] in [-1, 1]; above 0 is warm.

    Images are PIL, or uint8 [B, H, W, 3].
    """
    arrays = [np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image) for image in images]
    return torch.tensor([(array[..., 0].mean() - array[..., 2].mean()) / 255 for array in arrays], dtype=torch.float32)


def locate(source: str | None) -> tuple[str]:
    """The fingerprint: of the PickScore below and of the preference."""
    return (content_hash({"judge": pickscore.locate(source)[-1], "strength": STRENGTH, "taste": "red - blue"}, 64),)


def check(source: str | None) -> None:
    """ModelError where headers and tokenizer show that the PickScore below is not whole."""
    pickscore.check(source)


def load(*, source: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tinted:
    """PickScore from `source` (see there), with a preference for warm images."""
    return Tinted(pickscore.load(source=source, device=device, dtype=dtype), locate(source)[-1])
