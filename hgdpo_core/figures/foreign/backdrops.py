"""The six places in two flat bands, without the scenery that the target's images have."""

import numpy as np
from PIL import Image, ImageDraw

from ..scenes import CANVAS_PX, Colour, shade

BANDS: dict[str, tuple[Colour, Colour]] = {
    "in a park": ((176, 219, 246), (128, 190, 98)), "at the beach": ((189, 230, 250), (243, 220, 162)),
    "in the street": ((214, 222, 230), (168, 168, 172)), "in the snow": ((178, 198, 220), (238, 243, 249)),
    "at night": ((38, 46, 92), (58, 72, 104)), "in a room": ((244, 226, 200), (186, 134, 92))}
"""The colour above and below the horizon of each place."""
HORIZON_PX = (140, 190)


def draw_backdrop(place: str, rng: np.random.Generator) -> Image.Image:
    """The background of a place, RGB, 256 x 256."""
    above, below = BANDS[place]
    canvas = Image.new("RGB", (CANVAS_PX, CANVAS_PX), shade(above, rng))
    horizon = float(rng.uniform(*HORIZON_PX))
    ImageDraw.Draw(canvas).rectangle((0, horizon, CANVAS_PX, CANVAS_PX), fill=shade(below, rng))
    return canvas
