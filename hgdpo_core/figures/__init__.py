"""The figures setting, built in: drawn people, a miniature Stable Diffusion that generates them, a scorer shaped like
PickScore (the judge), and a classifier that counts limbs (the inspector).
A personalised target reads an image of a person (`identities`), whom an identity judge recognises.
Stand-ins for public preference pairs are made by a second generator and labelled by a third network (`foreign_pairs`).

Everything is 64 x 64 pixels and runs on a laptop's CPU without a download. The weights are in `weights/` inside the
package; `weights/README.md` describes how they were trained and how good they are. To train them again:

    python -m hgdpo_core.figures --output hgdpo_core/figures/weights
"""

from pathlib import Path

from .people import Figure, caption, parse_caption, prompts, sample_figure
from .renderer import DEFECTS, render

__all__ = ["DEFECTS", "Figure", "caption", "foreign_path", "identity_path", "inspector_path", "judge_path",
           "labeller_path", "parse_caption", "personaliser_path", "prompts", "render", "sample_figure", "target_path"]

_WEIGHTS = Path(__file__).parent / "weights"


def target_path() -> Path:
    """The folder of the shipped target model; `StableDiffusionPipeline.from_pretrained` opens it."""
    return _WEIGHTS / "target"


def judge_path() -> Path:
    """The folder of the shipped judge; `CLIPModel` and its processor open it, as they open PickScore."""
    return _WEIGHTS / "judge"


def inspector_path() -> Path:
    """The folder of the shipped inspector, an independent scorer for evaluation."""
    return _WEIGHTS / "inspector"


def personaliser_path() -> Path:
    """The folder of the target's InstantBooth adapter, with its image encoder."""
    return _WEIGHTS / "personaliser"


def identity_path() -> Path:
    """The folder of the judge of identity."""
    return _WEIGHTS / "identity"


def foreign_path() -> Path:
    """The folder of the foreign generator, a stand-in for those of public data sets. It holds no weights of a VAE: the
    target's completes it."""
    return _WEIGHTS / "foreign"


def labeller_path() -> Path:
    """The folder of the labeller of the stand-in pairs; no scorer of runs."""
    return _WEIGHTS / "labeller"
