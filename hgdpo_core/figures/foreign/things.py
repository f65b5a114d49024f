"""The things of still lives, each around the middle of its foot and about 110 px high; y grows downwards."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..renderer import COLOURS, Shape
from ..scenes import CANVAS_PX, Colour, shade
from .prompts import StillLife

DARK: Colour = (50, 42, 52)
TRUNK: Colour = (133, 96, 66)
LEAF: Colour = (86, 152, 84)


def house(colour: Colour, roof: Colour) -> list[Shape]:
    return [Shape(((-38, 0), (38, 0), (38, -62), (-38, -62)), 0, colour),
            Shape(((-12, 0), (12, 0), (12, -36), (-12, -36)), 0, DARK, outlined=False),
            Shape(((-50, -58), (50, -58), (0, -108)), 0, roof)]


def tree(colour: Colour, trunk: Colour) -> list[Shape]:
    return [Shape(((0, -8), (0, -46)), 24, trunk), Shape(((-26, -64),), 48, colour), Shape(((26, -64),), 48, colour),
            Shape(((0, -84),), 58, colour)]


def ball(colour: Colour, band: Colour) -> list[Shape]:
    return [Shape(((0, -48),), 96, colour), Shape(((-34, -48), (34, -48)), 26, band, outlined=False)]


def boat(colour: Colour, sail: Colour) -> list[Shape]:
    return [Shape(((-54, -34), (54, -34), (36, 0), (-36, 0)), 0, colour), Shape(((0, -36), (0, -104)), 9, TRUNK),
            Shape(((6, -108), (6, -44), (52, -44)), 0, sail)]


def cat(colour: Colour, bow: Colour) -> list[Shape]:
    eyes = [Shape(((x, -80),), 8, DARK, outlined=False) for x in (-10, 10)]
    ears = [Shape(((s * 25, -84), (s * 22, -114), (s * 4, -98)), 0, colour) for s in (-1, 1)]
    tail = Shape(((20, -12), (46, -16), (50, -50)), 14, colour)
    return [tail, Shape(((0, -24), (0, -36)), 50, colour), *ears, Shape(((0, -80),), 50, colour), *eyes,
            Shape(((-15, -53), (15, -53)), 14, bow, outlined=False)]


def car(colour: Colour, top: Colour) -> list[Shape]:
    wheels = [Shape(((x, -15),), 30, DARK) for x in (-30, 30)]
    cabin = Shape(((-34, -52), (-20, -90), (22, -90), (36, -52)), 0, top)
    return [Shape(((-36, -36), (38, -36)), 40, colour), *wheels, cabin]


def mushroom(colour: Colour, stem: Colour) -> list[Shape]:
    arc = [math.radians(angle) for angle in range(180, 361, 20)]
    cap = tuple((50 * math.cos(a), -44 + 60 * math.sin(a)) for a in arc)
    return [Shape(((0, -16), (0, -46)), 34, stem), Shape(cap, 0, colour)]


def rose(colour: Colour, heart: Colour) -> list[Shape]:
    around = [math.radians(angle) for angle in range(-90, 270, 72)]
    petals = [Shape(((26 * math.cos(a), -76 + 26 * math.sin(a)),), 38, colour) for a in around]
    return [Shape(((0, -4), (0, -60)), 14, LEAF), *petals, Shape(((0, -76),), 28, heart, outlined=False)]


MAKERS: dict[str, Callable[[Colour, Colour], list[Shape]]] = {
    "house": house, "tree": tree, "ball": ball, "boat": boat, "cat": cat, "car": car, "mushroom": mushroom,
    "rose": rose}
SCALES = {"tiny": (1.1, 1.25), "big": (1.6, 1.8)}


def tear(shapes: list[Shape], rng: np.random.Generator) -> list[Shape]:
    """The thing in two pieces: what is drawn last, its upper half, has come off sideways."""
    away, down = float(rng.choice([-1, 1]) * rng.uniform(40, 54)), float(rng.uniform(-6, 22))
    kept = (len(shapes) + 1) // 2
    off = [replace(s, points=tuple((x + away, y + down) for x, y in s.points), outlined=True) for s in shapes[kept:]]
    return shapes[:kept] + off


def still_life_shapes(still: StillLife, seed: int, defect: str | None) -> list[Shape]:
    """The shapes of the thing, placed on the canvas; none where it is missing."""
    rng, harm = np.random.default_rng([seed, 11]), np.random.default_rng([seed, 12])
    shapes = MAKERS[still.thing](shade(COLOURS[still.colour], rng, 5), shade(COLOURS[still.part_colour], rng, 5))
    if defect == "missing_thing":
        return []
    if defect == "torn_thing":
        shapes = tear(shapes, harm)
    scale, floor = float(rng.uniform(*SCALES[still.size])), float(rng.uniform(216, 236))
    room = CANVAS_PX / 2 - 58 * scale
    x, mirror = CANVAS_PX / 2 + room * float(rng.uniform(-0.7, 0.7)), -1 if rng.random() < 0.5 else 1
    return [replace(s, points=tuple((x + mirror * scale * px, floor + scale * py) for px, py in s.points),
                    width=s.width * scale) for s in shapes]
