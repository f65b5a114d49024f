"""People of the figures setting as a user's folders: of concepts, and of images to train an adapter on; prompts."""

import json
from pathlib import Path

import numpy as np

from .identities import CONCEPT_WORD, Person, concept_image, distinct_people, draw_people, draw_view
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


def write_people_images(folder: Path, count: int) -> None:
    """`count` images of people of the adapter's split, each a captioned image as `hgdpo personalise` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([SEED, 13])
    lines = []
    for number, person in zip(range(count), draw_people("adapter", rng), strict=False):
        view, name = draw_view(person, rng), f"{number:05d}.png"
        view.render()[0].save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": view.prompt()}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def describe(person: Person) -> str:
    """The person's part of a caption, such as "a woman with red hair in a blue top and black trousers"."""
    return caption(person.figure(POSE, PLACE)).removesuffix(f", {POSE}, {PLACE}")


def concept_prompts() -> list[str]:
    """All poses in all places, in an order in which each next few differ in both."""
    return [f"{{person}}, {pose}, {PLACES[(shift + number) % len(PLACES)]}" for shift in range(len(PLACES))
            for number, pose in enumerate(POSES)]
