"""People with an identity: what stays the same from one image of a person to the next.

A caption names hair and clothes; a person also has a skin and a badge on the chest, which no caption names. A concept
prompt names only the person, the pose and the place; the rest is to come from an image of that person. Each person
belongs to one of PEOPLE_SPLITS, always the same: a hash of its traits decides, so that those on whom an adapter, its
image encoder, the identity judge and the evaluation are based never meet.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from .people import HAIR, PEOPLE, PLACES, POSES, TOPS, TROUSERS, Figure
from .renderer import BADGE_COLOURS, BADGES, SKINS, Traits, render_with_mask

CONCEPT_WORD = "V"
"""One word and one token that no caption holds: it stands before the person whose image is given."""
TRAITS = {"person": PEOPLE, "hair": HAIR, "top": TOPS, "trousers": TROUSERS, "skin": tuple(range(len(SKINS))),
          "badge": BADGES, "badge_colour": BADGE_COLOURS}
PEOPLE_SPLITS = {"adapter": 50, "encoder": 20, "judge": 20, "validation": 5, "test": 5}
"""Percent of all people."""


@dataclass(frozen=True)
class Person:
    """Someone who can be drawn in any pose and place. Each field is a value of `TRAITS` of the same name."""

    person: str
    hair: str
    top: str
    trousers: str
    skin: int
    badge: str
    badge_colour: str

    def __post_init__(self) -> None:
        for name, values in TRAITS.items():
            if getattr(self, name) not in values:
                raise ValueError(f"person.{name} must be one of {', '.join(map(str, values))}; got "
                                 f"{getattr(self, name)!r}")

    def figure(self, pose: str, place: str) -> Figure:
        """What a full caption says of an image of this person; scorers and the inspector read that."""
        return Figure(self.person, self.hair, self.top, self.trousers, pose, place)

    def indices(self) -> list[int]:
        """The traits as indices into the values of `TRAITS`."""
        return [values.index(own) for values, own in zip(TRAITS.values(), astuple(self), strict=True)]


class View(NamedTuple):
    """One image of a person."""

    person: Person
    pose: str
    place: str
    seed: int

    def render(self) -> tuple[Image.Image, Image.Image]:
        """The image and the mask of its person, as `render_with_mask`."""
        traits = Traits(self.person.skin, self.person.badge, self.person.badge_colour)
        return render_with_mask(self.person.figure(self.pose, self.place), self.seed, traits=traits)

    def prompt(self) -> str:
        """The concept prompt, such as "a V woman, waving, in a park"."""
        return concept_prompt(self.person.person, self.pose, self.place)


def concept_prompt(person: str, pose: str, place: str) -> str:
    """A prompt that leaves hair, clothes, skin and badge to the concept's image."""
    return f"a {CONCEPT_WORD} {person}, {pose}, {place}"


def split_of_person(person: Person) -> str:
    """The split a person belongs to, by the sha256 of its traits."""
    text = ",".join(f"{name}={value}" for name, value in asdict(person).items())
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    for name, percent in PEOPLE_SPLITS.items():
        if bucket < percent:
            return name
        bucket -= percent
    raise AssertionError("the splits must add up to 100 percent")


def draw_people(split: str, rng: np.random.Generator, *, person: str | None = None) -> Iterator[Person]:
    """Endless people of a split, in which any may come again; all of one class word, if one is given."""
    if split not in PEOPLE_SPLITS:
        raise ValueError(f"split must be one of {', '.join(PEOPLE_SPLITS)}; got {split!r}")
    while True:
        drawn = {name: values[int(rng.integers(len(values)))] for name, values in TRAITS.items()}
        found = Person(**{**drawn, "person": person or drawn["person"]})
        if split_of_person(found) == split:
            yield found


def distinct_people(split: str, count: int, seed: int, *, person: str | None = None) -> list[Person]:
    """`count` different people of a split, the same for the same seed; a longer list begins with the shorter one."""
    people: dict[Person, None] = {}
    for found in draw_people(split, np.random.default_rng([seed, 77]), person=person):
        if len(people) >= count:
            break
        people[found] = None
    return list(people)


def draw_view(person: Person, rng: np.random.Generator, *, pose: str | None = None, place: str | None = None) -> View:
    """An image of the person in any pose and place, or in those given."""
    return View(person, pose or POSES[int(rng.integers(len(POSES)))], place or PLACES[int(rng.integers(len(PLACES)))],
                int(rng.integers(2**32)))


# -- concept images


CONCEPT_PX = 64
BACKDROP = (128, 128, 128)


def concept_image(view: View) -> Image.Image:
    """The person alone, cut out of an image on grey: what a concept encoder reads, RGB 64 x 64."""
    return cut_out(*view.render())


def cut_out(image: Image.Image, mask: Image.Image, margin: int = 2) -> Image.Image:
    """The square around a mask's content, all else grey, RGB 64 x 64. ValueError for an empty mask."""
    box = mask.point(lambda value: 255 * (value >= 128)).getbbox()  # type: ignore[operator]
    if box is None:
        raise ValueError("the mask is empty: expected a person")
    alone = Image.composite(image, Image.new("RGB", image.size, BACKDROP), mask)
    side = max(box[2] - box[0], box[3] - box[1]) + 2 * margin
    left, top = ((box[axis] + box[axis + 2] - side) // 2 for axis in (0, 1))
    square = Image.new("RGB", (side, side), BACKDROP)
    square.paste(alone, (-left, -top))
    return square.resize((CONCEPT_PX, CONCEPT_PX), Image.Resampling.BILINEAR)


def augment_concept(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A concept image turned, mirrored, cropped and moved a little, on grey."""
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle, zoom = float(rng.uniform(-15, 15)), float(rng.uniform(0.85, 1.15))
    turn, size = np.radians(angle), CONCEPT_PX / 2
    a, b = np.cos(turn) / zoom, np.sin(turn) / zoom
    x, y = rng.uniform(-5, 5, 2)
    matrix = (a, b, size - a * (size + x) - b * (size + y), -b, a, size + b * (size + x) - a * (size + y))
    return image.transform(image.size, Image.Transform.AFFINE, tuple(map(float, matrix)), Image.Resampling.BILINEAR,
                           fillcolor=BACKDROP)
