"""Who can appear in the figures setting: attributes, their captions, and the three splits.

A figure is six attributes; its caption names all six and nothing else, so each can be computed from the other. Every
caption belongs to one of `train`, `validation` and `test`, always the same: a hash of its text decides.
"""

import hashlib
import itertools
import re
from dataclasses import astuple, dataclass
from functools import cache

import numpy as np

PEOPLE = ("man", "woman", "boy", "girl")
HAIR = ("black", "brown", "blond", "red", "white", "pink")
TOPS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
TROUSERS = ("red", "orange", "green", "blue", "purple", "brown", "black", "white")
POSES = ("standing", "waving", "cheering", "arms out", "posing", "walking", "sitting", "jumping")
PLACES = ("in a park", "at the beach", "in the street", "in the snow", "at night", "in a room")

VOCABULARIES = {"person": PEOPLE, "hair": HAIR, "top": TOPS, "trousers": TROUSERS, "pose": POSES, "place": PLACES}
SPLITS = ("train", "validation", "test")

_CAPTION = re.compile(
    r"a (?P<person>\w+) with (?P<hair>\w+) hair in an? (?P<top>\w+) top and (?P<trousers>\w+) trousers, "
    r"(?P<pose>[\w ]+), (?P<place>[\w ]+)"
)


@dataclass(frozen=True)
class Figure:
    """One person as the captions describe them. Each field is a word of the vocabulary of the same name."""

    person: str
    hair: str
    top: str
    trousers: str
    pose: str
    place: str

    def __post_init__(self) -> None:
        for name, words in VOCABULARIES.items():
            word = getattr(self, name)
            if word not in words:
                raise ValueError(f"figure.{name} must be one of {', '.join(words)}; got {word!r}")


def caption(figure: Figure) -> str:
    """The caption of a figure, such as "a woman with red hair in a blue top and black trousers, waving, at night"."""
    article = "an" if figure.top[0] in "aeiou" else "a"
    return (f"a {figure.person} with {figure.hair} hair in {article} {figure.top} top "
            f"and {figure.trousers} trousers, {figure.pose}, {figure.place}")


def parse_caption(text: str) -> Figure:
    """The figure that a caption names; the inverse of `caption`. Raises ValueError for any other text."""
    match = _CAPTION.fullmatch(text)
    if match is None:
        raise ValueError(
            "a figures caption reads 'a <person> with <colour> hair in a <colour> top and <colour> trousers, "
            f"<pose>, <place>'; got {text!r}"
        )
    figure = Figure(**match.groupdict())
    if caption(figure) != text:
        raise ValueError(f"the caption of this figure is {caption(figure)!r}; got {text!r}")
    return figure


def sample_figure(rng: np.random.Generator) -> Figure:
    """A figure with every attribute drawn uniformly, from any split."""
    return Figure(**{name: words[int(rng.integers(len(words)))] for name, words in VOCABULARIES.items()})


def split_of(text: str) -> str:
    """The split a caption belongs to: 80 % train, 10 % validation, 10 % test, by the sha256 of its text."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


@cache
def figures_of(split: str) -> tuple[Figure, ...]:
    """Every figure of one split, in vocabulary order (73 728 over all three)."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    everyone = (Figure(*words) for words in itertools.product(*VOCABULARIES.values()))
    return tuple(figure for figure in everyone if split_of(caption(figure)) == split)


def prompts(split: str, count: int, seed: int) -> list[str]:
    """`count` distinct captions of a split, the same for the same seed; a longer list begins with the shorter one.

    Report results on `test`, choose settings on `validation`, draw pools and train on `train`.
    """
    figures = figures_of(split)
    if not 0 <= count <= len(figures):
        raise ValueError(f"split {split!r} holds {len(figures)} distinct captions; ask for at most that, got {count}")
    order = np.random.default_rng(seed).permutation(len(figures))
    return [caption(figures[i]) for i in order[:count]]


def change_attributes(figure: Figure, rng: np.random.Generator, *, names: tuple[str, ...] = ()) -> Figure:
    """The figure with each of the named attributes changed to another word; without names, one to three at random."""
    if not names:
        count = int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))
        names = tuple(rng.choice(list(VOCABULARIES), size=count, replace=False))
    words = dict(zip(VOCABULARIES, astuple(figure), strict=True))
    for name in names:
        others = [word for word in VOCABULARIES[name] if word != words[name]]
        words[name] = others[int(rng.integers(len(others)))]
    return Figure(**words)
