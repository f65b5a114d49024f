"""The judge of identity of the figures setting: it sees whole images, as they show one person each."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hgdpo_core.built_in import SOURCE
from hgdpo_core.figures.identities import CONCEPT_PX
from hgdpo_core.figures.identity_judge import embed_people, load_identity_judge
from hgdpo_core.scorers.identity.judges import Cut, IdentityJudge


class FiguresJudge(IdentityJudge):
    """`figures/identity_judge.py` behind the seam of the judges of photographs; `path` is its folder."""

    name = SOURCE

    def __init__(self, path: Path):
        self._network = load_identity_judge(path)

    def cut(self, image: Image.Image) -> Cut:
        small = image.convert("RGB").resize((CONCEPT_PX, CONCEPT_PX), Image.Resampling.BILINEAR)
        return Cut(np.asarray(small), 1)

    def embed(self, faces: Sequence[np.ndarray]) -> np.ndarray:
        return embed_people(self._network, faces)
