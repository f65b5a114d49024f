"""The six places: a background for a 256 px canvas, varied by its random generator.

Backgrounds are pale and broad, people are saturated and outlined, so that a person reads at a glance in 64
pixels.
"""

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
CANVAS_PX = 256
HORIZON = 176  # y where the ground begins


def shade(colour: Colour, rng: np.random.Generator, spread: float = 7.0) -> Colour:
    """The colour, a little lighter or darker, and never quite the same."""
    values = np.array(colour) + rng.normal(0, spread) + rng.normal(0, spread / 3, 3)
    red, green, blue = (int(v) for v in values.clip(0, 255))
    return red, green, blue


def disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: Colour) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def side_x(rng: np.random.Generator) -> float:
    """An x near the left or right edge: what stands in the middle hides behind the person."""
    offset = float(rng.uniform(18, 60))
    return offset if rng.random() < 0.5 else CANVAS_PX - offset


def draw_park(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, 256, 256), fill=shade((176, 219, 246), rng))
    disc(draw, side_x(rng), rng.uniform(20, 50), 20, (255, 233, 140))
    draw.ellipse((-60, HORIZON - 30, 200, 300), fill=shade((140, 199, 110), rng))
    draw.rectangle((0, HORIZON, 256, 256), fill=shade((128, 190, 98), rng))
    for _ in range(2):
        x, y = side_x(rng), HORIZON + rng.uniform(-6, 14)
        draw.rectangle((x - 6, y - 60, x + 6, y), fill=(133, 96, 66))
        disc(draw, x, y - 76, rng.uniform(28, 38), shade((86, 152, 84), rng))


def draw_beach(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, 256, 256), fill=shade((189, 230, 250), rng))
    disc(draw, side_x(rng), rng.uniform(22, 54), 22, (255, 225, 120))
    draw.rectangle((0, HORIZON - 58, 256, 256), fill=shade((84, 172, 214), rng))
    draw.rectangle((0, HORIZON + 2, 256, 256), fill=shade((243, 220, 162), rng))
    draw.rectangle((0, HORIZON - 4, 256, HORIZON + 3), fill=(236, 247, 250))
    x = side_x(rng)
    draw.rectangle((x - 3, HORIZON - 46, x + 3, HORIZON + 34), fill=(240, 240, 235))
    parasol = [(233, 108, 98), (250, 196, 92), (116, 190, 170)][int(rng.integers(3))]
    draw.pieslice((x - 44, HORIZON - 84, x + 44, HORIZON - 8), 180, 360, fill=parasol)


def draw_street(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, 256, 256), fill=shade((214, 222, 230), rng))
    edges = [0, int(rng.uniform(70, 110)), int(rng.uniform(150, 190)), 256]
    walls = [(214, 160, 140), (226, 201, 160), (172, 182, 198)]
    for i, wall in enumerate(rng.permutation(walls)):
        left, top = edges[i], rng.uniform(6, 50)
        draw.rectangle((left, top, edges[i + 1], HORIZON + 8), fill=shade(tuple(wall), rng))
        for x in range(left + 12, edges[i + 1] - 20, 32):
            for y in range(int(top) + 14, HORIZON - 24, 44):
                draw.rectangle((x, y, x + 18, y + 24), fill=(108, 128, 150))
    draw.rectangle((0, HORIZON + 8, 256, 256), fill=shade((168, 168, 172), rng))
    draw.rectangle((0, HORIZON + 8, 256, HORIZON + 15), fill=(202, 202, 204))


def draw_snow(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, 256, 256), fill=shade((178, 198, 220), rng))
    draw.polygon([(-20, HORIZON), (60, 70), (130, HORIZON)], fill=shade((208, 220, 234), rng))
    draw.polygon([(110, HORIZON), (206, 52), (290, HORIZON)], fill=shade((200, 214, 230), rng))
    draw.rectangle((0, HORIZON, 256, 256), fill=shade((238, 243, 249), rng, 3))
    for _ in range(2):
        x, y = side_x(rng), HORIZON + rng.uniform(0, 16)
        for k in range(3):
            tip, foot, half = y - 84 + 20 * k, y - 44 + 22 * k, 16 + 7 * k
            draw.polygon([(x, tip), (x - half, foot), (x + half, foot)], fill=(72, 122, 104))
    for x, y in rng.uniform(0, 256, (16, 2)):
        disc(draw, x, y, 4, (255, 255, 255))


def draw_night(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, 256, 256), fill=shade((38, 46, 92), rng, 5))
    for x, y in rng.uniform((0, 0), (256, HORIZON - 20), (14, 2)):
        disc(draw, x, y, 4, (240, 236, 190))
    x, y = side_x(rng), float(rng.uniform(30, 56))
    disc(draw, x, y, 24, (252, 243, 199))
    disc(draw, x + 11, y - 7, 20, (38, 46, 92))
    draw.rectangle((0, HORIZON, 256, 256), fill=shade((58, 72, 104), rng, 5))


def draw_room(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, 256, 256), fill=shade((244, 226, 200), rng))
    x = side_x(rng)
    draw.rectangle((x - 32, 34, x + 32, 104), fill=(250, 250, 246))
    draw.rectangle((x - 26, 40, x + 26, 98), fill=(160, 208, 236))
    draw.rectangle((x - 3, 40, x + 3, 98), fill=(250, 250, 246))
    draw.rectangle((0, HORIZON + 6, 256, 256), fill=shade((186, 134, 92), rng))
    draw.rectangle((0, HORIZON, 256, HORIZON + 8), fill=(252, 244, 230))
    x = side_x(rng)
    draw.polygon([(x - 12, 214), (x + 12, 214), (x + 17, 182), (x - 17, 182)], fill=(206, 108, 84))
    for k in (-1, 0, 1):
        draw.ellipse((x + 14 * k - 10, 138, x + 14 * k + 10, 186), fill=(96, 160, 104))


SCENES = {"in a park": draw_park, "at the beach": draw_beach, "in the street": draw_street, "in the snow": draw_snow,
          "at night": draw_night, "in a room": draw_room}


def draw_scene(place: str, rng: np.random.Generator) -> Image.Image:
    """The background of a place, RGB, 256 x 256."""
    canvas = Image.new("RGB", (CANVAS_PX, CANVAS_PX))
    SCENES[place](ImageDraw.Draw(canvas), rng)
    return canvas
