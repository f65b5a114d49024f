"""The people of foreign images: taller, with small wide heads, plain faces and blocks of hair."""

import numpy as np

from ..people import Figure
from ..renderer import SHOE, Palette, Shape, break_limbs, choose_palette, head_centres, of_part
from ..scenes import Colour
from ..skeleton import Build, Limb, Point, Skeleton, build_skeleton

BUILDS = {
    "man": Build(52, 50, 66, 37, 24, 42, 40, 28, 23, 28),
    "woman": Build(52, 50, 58, 27, 24, 38, 37, 28, 20, 26),
    "boy": Build(36, 34, 50, 28, 20, 34, 32, 29, 20, 24),
    "girl": Build(36, 34, 46, 23, 20, 32, 31, 28, 19, 23),
}
STOOL: Colour = (112, 106, 118)
EYE: Colour = (40, 30, 36)

def limb_shapes(name: str, joints: Limb, build: Build, palette: Palette) -> list[Shape]:
    """An arm with a short sleeve, or a leg with its shoe."""
    if name.endswith("arm"):
        return [Shape(joints, build.arm_width - 3, palette.skin), Shape(joints[:2], build.arm_width, palette.top)]
    (x, y), outwards = joints[2], -9 if name.startswith("left") else 9
    return [Shape(joints, build.leg_width, palette.trousers), Shape(((x, y + 2), (x + outwards, y + 2)), 16, SHOE)]


def torso_shapes(skeleton: Skeleton, build: Build, palette: Palette) -> list[Shape]:
    left, right = skeleton.shoulders
    hem = [(x + side * build.leg_width * 0.42, y + 6) for (x, y), side in zip(skeleton.hips, (-1, 1), strict=True)]
    throat = (skeleton.neck[0], skeleton.neck[1] - 12)
    return [Shape((skeleton.neck, throat), 15, palette.skin), Shape(skeleton.hips, build.leg_width, palette.trousers),
            Shape((left, right, hem[1], hem[0]), 0, palette.top), Shape((left, right), build.arm_width, palette.top)]


def back_hair(person: str, centre: Point, radius: float, colour: Colour) -> list[Shape]:
    """A woman's hair falls to her shoulders in one piece; a girl's is a bun on top."""
    x, y = centre
    if person == "woman":
        half, low = radius * 1.32, y + radius * 1.55
        return [Shape(((x - half, y - radius * 0.6), (x + half, y - radius * 0.6), (x + half + 5, low),
                       (x - half - 5, low)), 0, colour)]
    return [Shape(((x, y - radius * 1.25),), 27, colour)] if person == "girl" else []


def front_hair(person: str, centre: Point, radius: float, colour: Colour) -> list[Shape]:
    """A block above the forehead; a man's is flat and he has a beard, a boy's stands up in three points."""
    x, y = centre
    half, brow, top = radius * 1.18, y - radius * 0.36, y - radius * 1.06
    block = Shape(((x - half, brow), (x - half * 0.86, top), (x + half * 0.86, top), (x + half, brow)), 0, colour)
    if person == "boy":
        points = [(x + half * dx, top - (15 if i % 2 else -4)) for i, dx in enumerate((-.9, -.6, -.3, 0, .3, .6, .9))]
        return [Shape(((x - half, brow), *points, (x + half, brow)), 0, colour)]
    if person == "man":
        beard = Shape(((x - radius * 0.7, y + radius * 0.52), (x + radius * 0.7, y + radius * 0.52),
                       (x + radius * 0.3, y + radius * 1.05), (x - radius * 0.3, y + radius * 1.05)), 0, colour,
                      outlined=False)
        return [block, beard]
    return [block]


def head_shapes(person: str, centre: Point, build: Build, palette: Palette) -> list[Shape]:
    """A wide head, two eyes and the hair in front."""
    (x, y), radius = centre, build.head
    face = Shape(((x - radius * 0.3, y), (x + radius * 0.3, y)), 1.84 * radius, palette.skin)
    eyes = [Shape(((x + side * 12, y + 2),), 8, EYE, outlined=False) for side in (-1, 1)]
    return [face, *eyes, *front_hair(person, centre, radius, palette.hair)]


def person_shapes(figure: Figure, seed: int, defect: str | None) -> tuple[list[Shape], Skeleton]:
    """All shapes of a person in drawing order, around the skeleton they belong to."""
    rng, harm = np.random.default_rng([seed, 11]), np.random.default_rng([seed, 12])
    build, palette = BUILDS[figure.person], choose_palette(figure, rng)
    skeleton = build_skeleton(figure.person, figure.pose, rng, build)
    limbs = break_limbs(skeleton.limbs, defect, build, harm)
    heads = head_centres(skeleton.head, build.head * 1.15, defect)
    shapes = of_part("head", [s for c in heads for s in back_hair(figure.person, c, build.head, palette.hair)])
    if figure.pose == "sitting":
        x, y = build.hip + 12, 10.0
        shapes.append(Shape(((-x, y), (x, y), (x, skeleton.ground), (-x, skeleton.ground)), 0, STOOL))
    arms, legs = ([s for n in limbs if n.endswith(kind) for s in limb_shapes(n, limbs[n], build, palette)]
                  for kind in ("arm", "leg"))
    torso = of_part("torso", torso_shapes(skeleton, build, palette))
    arms, legs = of_part("arm", arms), of_part("leg", legs)
    shapes += [*torso, *arms, *legs] if figure.pose == "sitting" else [*legs, *torso, *arms]
    for centre in heads:
        shapes += of_part("head", head_shapes(figure.person, centre, build, palette))
    return shapes, skeleton
