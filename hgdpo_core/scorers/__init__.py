"""Scorers of images behind one small interface: `load_scorer(name).score(images, prompts)`."""

import functools
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image

from hgdpo_core.config import ScorerConfig
from hgdpo_core.devices import DTYPES, refuse_precision
from hgdpo_core.errors import ConfigError, ModelError
from hgdpo_core.images import decode_image
from hgdpo_core.scorers import aesthetic, clip, hps, imagereward, inspector, pickscore, tinted
from hgdpo_core.scorers.pixels import Images, Prepared


class Scorer(Protocol):
    """Scores images: higher is better. `fingerprint` differs between versions of its weights.

    A score depends on its own image and prompt alone: the rest of a batch, its order and size move it by float
    rounding only (below 1e-5 in float32). A score that is not finite comes back as it is: a pool that holds one
    yields no triplet, and a win rate refuses it.
    """

    name: str
    fingerprint: str

    def score(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [B] on the CPU for B images (PIL, or uint8 [B, H, W, 3]) and their B prompts."""
        ...


class ScorerSource(Protocol):
    """An entry of `SCORERS`: a module or an object that finds a scorer and loads it.

    One that can recognise a defective image declares DEFECT_BELOW too: an image that scores below is defective. One
    that loads a `DifferentiableScorer` declares GIVES_GRADIENT.
    """

    @property
    def NAME(self) -> str:
        """In settings, names of files and results."""
        ...

    @property
    def TITLE(self) -> str:
        """In reports."""
        ...

    def locate(self, source: str | None) -> tuple[Any, ...]:
        """What the scorer is made of; the last item is the fingerprint. ModelError when it is not available."""
        ...

    def check(self, source: str | None) -> None:
        """ModelError where headers and tokenizer show that the scorer would not load; costs no load of a network."""
        ...

    def load(self, *, source: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Scorer:
        """The scorer, its networks in `dtype`."""
        ...


LISTED: tuple[ScorerSource, ...] = (pickscore, hps.V20, hps.V21, imagereward, aesthetic, clip, inspector, tinted)
SCORERS = {scorer.NAME: scorer for scorer in LISTED}


def load_scorer(name: str, *, source: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32,
                tf32: bool = False) -> Scorer:
    """A scorer by name; `source` is a hub id, a folder or (but for pickscore) a weights file, None the public weights.

    pickscore, tinted and inspector have built-in weights too (hgdpo_core/built_in.py). `tf32`: what it computes in
    float32 is computed in TF32. ConfigError where the device has no such arithmetic.
    """
    refuse_precision(f"the dtype of scorer {name}", "tf32" if tf32 else str(dtype).removeprefix("torch."), device)
    with _named(name):
        scorer: Any = _module(name).load(source=source, device=device, dtype=dtype)
    scorer.float32 = "tf32" if tf32 else "ieee"
    return scorer


def find_scorer(name: str, source: str | None) -> str:
    """The fingerprint of a scorer without loading it; ModelError when its weights are not available, or not whole."""
    with _named(name):
        fingerprint = _module(name).locate(source)[-1]
        _check_once(name, source, fingerprint)
    return fingerprint


@contextmanager
def _named(scorer: str) -> Iterator[None]:
    """A ModelError's message begins with the scorer that it is about."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"scorer {scorer}: {error}") from None


@functools.lru_cache(maxsize=64)
def _check_once(name: str, source: str | None, fingerprint: str) -> None:
    _module(name).check(source)


def require_scorers(scorers: Sequence[ScorerConfig], option: str = "--set evaluation.scorers=") -> None:
    """ModelError, in one line, when one of an evaluation's scorers is not available: what to do, with it or without.

    `option` is what a user would write before the names of the scorers.
    """
    reasons: dict[str, str] = {}
    for scorer in scorers:
        try:
            find_scorer(scorer.name, scorer.source)
        except ModelError as error:
            reasons[scorer.name] = str(error)
    if not reasons:
        return
    others = list(reasons)[1:]
    message = next(iter(reasons.values())) + (f" (missing too: {', '.join(others)})" if others else "")
    left = ",".join(f"{scorer.name}={scorer.source}" if scorer.source else scorer.name
                    for scorer in scorers if scorer.name not in reasons)
    raise ModelError(message + (f"; or do without: {option + shlex.quote(left)}" if left else ""))


def scorer_title(name: str) -> str:
    """What reports call a scorer; the name itself of one that is not listed."""
    return SCORERS[name].TITLE if name in SCORERS else name


def defect_limit(name: str) -> float | None:
    """The score under which an image is defective, for scorers that recognise those; None for those that only rank."""
    return getattr(_module(name), "DEFECT_BELOW", None)


@runtime_checkable
class ImageEmbedder(Protocol):
    """A scorer with an image tower of its own, whose features show how much images differ."""

    def embed_images(self, images: Images) -> torch.Tensor:
        """L2-normalised float32 [B, D] of B images (PIL, or uint8 [B, H, W, 3])."""
        ...


class DifferentiableScorer(Protocol):
    """A scorer whose score can be improved by its gradient."""

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [B] for pixels [B, 3, H, W], float32 in 0..1, with the gradient to them; none goes to the prompts."""
        ...

    def to(self, device: torch.device | str) -> Any:
        """Move to a device, in place."""
        ...


@runtime_checkable
class ImagePreparer(Protocol):
    """A scorer whose `score` and `embed_images` take also a list of what `prepare` gives, for equal results."""

    def prepare(self, image: Image.Image) -> Prepared:
        """What the network sees of one image; computed on the CPU, in any thread."""
        ...


def preparation(scorer: Scorer | ImageEmbedder) -> Callable[[bytes], Any]:
    """What can be done with an encoded image before it reaches the network: decoding, and `prepare` where there is."""
    if not isinstance(scorer, ImagePreparer):
        return decode_image
    return lambda data: scorer.prepare(decode_image(data))


def load_embedder(scorer: ScorerConfig, device: str) -> ImageEmbedder:
    """The image tower of a scorer; ConfigError for a scorer that has none."""
    loaded = load_configured_scorer(scorer, device)
    if not isinstance(loaded, ImageEmbedder):
        raise ConfigError(f"scorer {scorer.name} has no image features of its own: use pickscore or clip")
    return loaded


def require_gradient(name: str) -> None:
    """ConfigError for a scorer that is no `DifferentiableScorer`; nothing is loaded."""
    if not getattr(_module(name), "GIVES_GRADIENT", False):
        able = ", ".join(other for other, source in SCORERS.items() if getattr(source, "GIVES_GRADIENT", False))
        raise ConfigError(f"scorer {name} gives no gradient: set scorer.name to {able}")


def load_differentiable(scorer: ScorerConfig, device: str) -> DifferentiableScorer:
    """A scorer through which gradients flow; ConfigError for any other."""
    require_gradient(scorer.name)
    loaded: Any = load_configured_scorer(scorer, device)
    return loaded


def _module(name: str) -> ScorerSource:
    if name not in SCORERS:
        raise ConfigError(f"there is no scorer {name!r}; there are {', '.join(sorted(SCORERS))}")
    return SCORERS[name]


def load_configured_scorer(scorer: ScorerConfig, device: str) -> Scorer:
    """The scorer that the settings name."""
    return load_scorer(scorer.name, source=scorer.source, device=device,
                       dtype=DTYPES.get(scorer.dtype, torch.float32), tf32=scorer.dtype == "tf32")
