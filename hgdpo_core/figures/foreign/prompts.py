"""What the foreign images show: the people of the figures captions, and still lives, which hold no person.

A still life is one thing of two colours in a place, such as "a big red house with a blue roof, in a park". Many of its
words are those of the figures captions, so the target's tokenizer spells every caption in 24 tokens. None of them names
a human: the filter of foreign pairs tells the two kinds of captions apart.
"""

import itertools
import re
from dataclasses import astuple, dataclass
from functools import cache

import numpy as np

from ..people import PLACES, SPLITS, TOPS, Figure, caption, figures_of, parse_caption, prompts, split_of

PARTS = {"house": "roof", "tree": "trunk", "ball": "band", "boat": "sail", "cat": "bow", "car": "top",
         "mushroom": "stem", "rose": "heart"}
"""The things, and the part of each that has a colour of its own."""
VOCABULARIES = {"size": ("big", "tiny"), "colour": TOPS, "thing": tuple(PARTS), "part_colour": TOPS, "place": PLACES}
WITHOUT_PEOPLE = 0.3
"""The fraction of foreign prompts that are still lives."""

_CAPTION = re.compile(r"a (?P<size>\w+) (?P<colour>\w+) (?P<thing>\w+) with an? (?P<part_colour>\w+) \w+, "
                      r"(?P<place>[\w ]+)")


@dataclass(frozen=True)
class StillLife:
    """One thing in a place. Each field is a word of the vocabulary of the same name."""

    size: str
    colour: str
    thing: str
    part_colour: str
    place: str

    def __post_init__(self) -> None:
        for name, words in VOCABULARIES.items():
            word = getattr(self, name)
            if word not in words:
                raise ValueError(f"still life's {name} must be one of {', '.join(words)}; got {word!r}")


Scene = Figure | StillLife
"""What a foreign image can show."""


def still_life_caption(still: StillLife) -> str:
    """The caption of a still life, such as "a tiny green cat with an orange bow, at the beach"."""
    article = "an" if still.part_colour[0] in "aeiou" else "a"
    return (f"a {still.size} {still.colour} {still.thing} with {article} {still.part_colour} {PARTS[still.thing]}, "
            f"{still.place}")


def scene_caption(scene: Scene) -> str:
    """The caption of a figure or a still life."""
    return caption(scene) if isinstance(scene, Figure) else still_life_caption(scene)


def parse_scene(text: str) -> Scene:
    """The figure or still life that a caption names; the inverse of `scene_caption`. ValueError for any other text."""
    match = _CAPTION.fullmatch(text)
    if match is None:
        return parse_caption(text)
    still = StillLife(**match.groupdict())
    if still_life_caption(still) != text:
        raise ValueError(f"the caption of this still life is {still_life_caption(still)!r}; got {text!r}")
    return still


@cache
def still_lives_of(split: str) -> tuple[StillLife, ...]:
    """Every still life of one split, in vocabulary order (6 144 over all three)."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    every = (StillLife(*words) for words in itertools.product(*VOCABULARIES.values()))
    return tuple(still for still in every if split_of(still_life_caption(still)) == split)


def sample_scenes(split: str, count: int, rng: np.random.Generator, *, without_people: float = WITHOUT_PEOPLE
                  ) -> list[Scene]:
    """`count` scenes of a split, drawn with replacement; each is a still life with probability `without_people`."""
    figures, stills = figures_of(split), still_lives_of(split)
    empty = rng.random(count) < without_people
    picks = rng.random(count)
    return [stills[int(p * len(stills))] if still else figures[int(p * len(figures))]
            for still, p in zip(empty, picks, strict=True)]


def foreign_prompts(split: str, count: int, seed: int) -> list[str]:
    """`count` distinct foreign captions of a split, the same for the same seed; a longer list begins with the shorter
    one. Of every ten prompts three hold no person. ValueError where a split has too few."""
    empty = [_stills_among(i + 1) - _stills_among(i) for i in range(count)]
    stills = iter(_still_life_prompts(split, sum(empty), seed))
    people = iter(prompts(split, count - sum(empty), seed))
    return [next(stills) if still else next(people) for still in empty]


def _stills_among(count: int) -> int:
    """How many of the first `count` prompts are still lives."""
    return int(count * round(WITHOUT_PEOPLE * 100) // 100)


def _still_life_prompts(split: str, count: int, seed: int) -> list[str]:
    stills = still_lives_of(split)
    if count > len(stills):
        raise ValueError(f"split {split!r} holds {len(stills)} still lives; ask for at most that, got {count}")
    order = np.random.default_rng([seed, 30]).permutation(len(stills))
    return [still_life_caption(stills[i]) for i in order[:count]]


def change_still_life(still: StillLife, rng: np.random.Generator, *, colour_only: bool = False) -> StillLife:
    """The still life with one attribute changed, or one colour."""
    names = ("colour", "part_colour") if colour_only else tuple(VOCABULARIES)
    name = names[int(rng.integers(len(names)))]
    words = dict(zip(VOCABULARIES, astuple(still), strict=True))
    others = [word for word in VOCABULARIES[name] if word != words[name]]
    return StillLife(**{**words, name: others[int(rng.integers(len(others)))]})
