"""Render a foreign scene: a person or a still life in flat colours with a thick edge, correct or with a chosen defect.

As in the target's renderer one seed fixes everything, and a defect changes nothing but itself.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..people import Figure
from ..renderer import DEFECTS, OUTLINE, Shape, alter_figure, draw_shape, place_shapes
from .backdrops import draw_backdrop
from .bodies import person_shapes
from .prompts import Scene, StillLife, change_still_life
from .things import still_life_shapes

STILL_LIFE_DEFECTS = ("missing_thing", "torn_thing", "wrong_colour", "wrong_caption")
EDGE_PX = 7.0


def defects_of(scene: Scene) -> tuple[str, ...]:
    """The defects that a scene of this kind can have."""
    return DEFECTS if isinstance(scene, Figure) else STILL_LIFE_DEFECTS


def render_foreign(scene: Scene, seed: int, *, defect: str | None = None, size_px: int = 64) -> Image.Image:
    """An image of the scene, RGB, `size_px` square. `defect` is None or one of `defects_of(scene)`.

    The same arguments give the same pixels. ValueError for a defect that the scene cannot have.
    """
    if defect is not None and defect not in defects_of(scene):
        raise ValueError(f"defect must be None or one of {', '.join(defects_of(scene))}; got {defect!r}")
    scene = alter_scene(scene, seed, defect)
    canvas = draw_backdrop(scene.place, np.random.default_rng([seed, 10]))
    draw = ImageDraw.Draw(canvas)
    shapes = (place_shapes(*person_shapes(scene, seed, defect), seed)[0] if isinstance(scene, Figure)
              else still_life_shapes(scene, seed, defect))
    draw_shapes(draw, shapes)
    return canvas.resize((size_px, size_px), Image.Resampling.BOX)


def alter_scene(scene: Scene, seed: int, defect: str | None) -> Scene:
    """The scene that is really drawn: another one for the two defects that contradict the caption."""
    if isinstance(scene, StillLife):
        if defect not in ("wrong_colour", "wrong_caption"):
            return scene
        return change_still_life(scene, np.random.default_rng([seed, 14]), colour_only=defect == "wrong_colour")
    return alter_figure(scene, seed, defect)


def draw_shapes(draw: ImageDraw.ImageDraw, shapes: Sequence[Shape]) -> None:
    """Draw shapes as one piece with a thick edge around it."""
    for shape in shapes:
        if shape.outlined:
            draw_shape(draw, shape, EDGE_PX, OUTLINE)
    for shape in shapes:
        draw_shape(draw, shape, 0, shape.colour)


def render_scenes(scenes: Sequence[Scene], seeds: Sequence[int], defects: Sequence[str | None] | None = None
                  ) -> np.ndarray:
    """Images uint8 `[B,64,64,3]`."""
    defects = defects or [None] * len(scenes)
    return np.stack([np.asarray(render_foreign(scene, seed, defect=defect))
                     for scene, seed, defect in zip(scenes, seeds, defects, strict=True)])
