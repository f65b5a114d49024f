"""People of the figures setting as a user's folder of concepts, and prompts for them."""

from pathlib import Path

import numpy as np

from .identities import CONCEPT_WORD, Person, concept_image, distinct_people, draw_view
from .people import PLACES, POSES, caption

SEED = 9
POSE, PLACE = POSES[0], PLACES[0]


def write_people(folder: Path, count: int, split: str = "test") -> None:
    """One cut-out image of each of `count` people of a split, and beside it what prompts and scorers call them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([SEED, 12])
    for number, person in enumerate(distinct_people(split, count, SEED)):
        concept_image(draw_view(person, rng)).save(folder / f"person-{number:03d}.png")
        words = f"a {CONCEPT_WORD} {person.person}\n{describe(person)}\n"
        (folder / f"person-{number:03d}.txt").write_text(words)


def describe(person: Person) -> str:
    """The person's part of a caption, such as "a woman with red hair in a blue top and black trousers"."""
    return caption(person.figure(POSE, PLACE)).removesuffix(f", {POSE}, {PLACE}")


def concept_prompts() -> list[str]:
    """All poses in all places, in an order in which each next few differ in both."""
    return [f"{{person}}, {pose}, {PLACES[(shift + number) % len(PLACES)]}" for shift in range(len(PLACES))
            for number, pose in enumerate(POSES)]
