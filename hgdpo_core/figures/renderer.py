"""Render a figure: an articulated person in a place, in 64 x 64 pixels, correct or with a chosen defect.

The person is a list of simple shapes, drawn twice on a canvas of 256 x 256: first fattened in a dark outline colour,
then in their own colours; the fattened silhouette is also the mask. One seed fixes everything. A defect has its own
random generator, so the defective image of a seed differs from the correct one only by its defect.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from .people import Figure, change_attributes
from .scenes import CANVAS_PX, Colour, draw_scene, shade
from .skeleton import BUILDS, Build, Limb, Point, Skeleton, bend, build_skeleton

DEFECTS = ("missing_limb", "detached_limb", "extra_limb", "no_head", "two_heads", "wrong_colour", "wrong_caption")

PARTS = ("head", "torso", "arm", "leg")
WHOLE = {"arms": 2, "legs": 2, "heads": 1, "loose": 0}
"""What can be counted in a correct image: attached arms and legs, heads, and limbs that hang in the air."""
OUTLINE: Colour = (44, 36, 48)
OUTLINE_PX = 4.5
SHOE: Colour = (74, 52, 48)
SKINS: tuple[Colour, ...] = ((255, 222, 196), (240, 196, 158), (206, 152, 110), (150, 102, 70))
COLOURS: dict[str, Colour] = {"black": (50, 48, 56), "white": (246, 246, 242), "brown": (134, 84, 46),
                              "red": (222, 48, 46), "orange": (246, 138, 34), "yellow": (250, 216, 50),
                              "green": (46, 158, 74), "blue": (48, 100, 220), "purple": (138, 70, 186),
                              "pink": (248, 136, 184)}
HAIR_COLOURS: dict[str, Colour] = {"black": (40, 36, 42), "brown": (122, 74, 40), "blond": (244, 206, 92),
                                   "red": (204, 78, 32), "white": (236, 236, 238), "pink": (248, 120, 180)}


BADGES = ("disc", "square", "triangle", "cross")
BADGE_COLOURS = ("white", "yellow", "red", "green", "blue", "black")
BADGE_PX = 15.0


@dataclass(frozen=True)
class Traits:
    """What an image of a certain person shows beside its figure: a skin, and a badge on the chest."""

    skin: int  # index into SKINS
    badge: str
    badge_colour: str


@dataclass(frozen=True)
class Shape:
    """A stroke with round ends through points (`width` > 0; one point is a disc), or a polygon (`width` 0)."""

    points: tuple[Point, ...]
    width: float
    colour: Colour
    outlined: bool = True
    part: str = ""  # one of PARTS, or none of them


@dataclass(frozen=True)
class Palette:
    skin: Colour
    hair: Colour
    top: Colour
    trousers: Colour


def choose_palette(figure: Figure, rng: np.random.Generator, traits: Traits | None = None) -> Palette:
    skin = SKINS[int(rng.integers(len(SKINS)))]  # drawn with traits too: all else stays as without them
    if traits is not None:
        skin = SKINS[traits.skin]
    return Palette(skin=shade(skin, rng, 4), hair=shade(HAIR_COLOURS[figure.hair], rng, 5),
                   top=shade(COLOURS[figure.top], rng, 6), trousers=shade(COLOURS[figure.trousers], rng, 6))


def limb_shapes(name: str, joints: Limb, build: Build, palette: Palette) -> list[Shape]:
    """An arm with its hand, or a leg with its shoe."""
    if name.endswith("arm"):
        return [Shape(joints, build.arm_width, palette.top), Shape((joints[2],), build.arm_width + 3, palette.skin)]
    (x, y), outwards = joints[2], -6 if name.startswith("left") else 6
    shoe = Shape(((x, y + 1), (x + outwards, y + 1)), 19, SHOE)
    return [Shape(joints, build.leg_width, palette.trousers), shoe]


def torso_shapes(skeleton: Skeleton, build: Build, palette: Palette) -> list[Shape]:
    left, right = skeleton.shoulders
    waist_left = (skeleton.hips[0][0] - build.leg_width * 0.3, skeleton.hips[0][1] - 4)
    waist_right = (skeleton.hips[1][0] + build.leg_width * 0.3, skeleton.hips[1][1] - 4)
    throat = (skeleton.neck[0], skeleton.neck[1] - 12)
    neck = Shape((skeleton.neck, throat), 17, palette.skin)
    hips = Shape((skeleton.hips[0], skeleton.hips[1]), build.leg_width, palette.trousers)
    chest = Shape((left, right, waist_right, waist_left), 0, palette.top)
    yoke = Shape((left, right), build.arm_width, palette.top)
    return [neck, hips, chest, yoke]


def badge_shapes(skeleton: Skeleton, traits: Traits) -> list[Shape]:
    """The badge in the middle of the chest, on a dark rim: on a top of its own colour it shows all the same."""
    corners = (*skeleton.shoulders, *skeleton.hips)
    x, y = (sum(corner[axis] for corner in corners) / 4 for axis in (0, 1))
    return [shape for size, colour in ((BADGE_PX + 3.5, OUTLINE), (BADGE_PX, COLOURS[traits.badge_colour]))
            for shape in badge_outline(traits.badge, (x, y), size, colour)]


def badge_outline(badge: str, centre: Point, size: float, colour: Colour) -> list[Shape]:
    x, y = centre
    if badge == "disc":
        return [Shape((centre,), 2 * size, colour, outlined=False)]
    if badge == "triangle":
        corners = ((x, y - 1.3 * size), (x + 1.3 * size, y + size), (x - 1.3 * size, y + size))
        return [Shape(corners, 0, colour, outlined=False)]
    arms = [(size, size)] if badge == "square" else [(1.4 * size, 0.5 * size), (0.5 * size, 1.4 * size)]
    return [Shape(((x - w, y - h), (x + w, y - h), (x + w, y + h), (x - w, y + h)), 0, colour, outlined=False)
            for w, h in arms]


def back_hair(person: str, centre: Point, radius: float, colour: Colour) -> list[Shape]:
    """Hair that falls behind the head: it tells a woman and a girl from a man and a boy."""
    x, y = centre
    if person == "woman":
        return [Shape(((x + s * 22, y - 4), (x + s * 27, y + radius + 16)), 31, colour) for s in (-1, 1)]
    if person == "girl":
        return [Shape(((x + s * (radius + 3), y - 8), (x + s * (radius + 12), y + 14)), 21, colour) for s in (-1, 1)]
    return []


def front_hair(person: str, centre: Point, radius: float, colour: Colour) -> list[Shape]:
    """The cap of hair above the forehead; a boy's stands up in a tuft, a man wears a moustache too."""
    x, y = centre
    arc = [np.radians(a) for a in range(195, 350, 15)]
    crown = tuple((x + radius * 0.98 * float(np.cos(a)), y + radius * 0.98 * float(np.sin(a))) for a in arc)
    fringe = ((x + radius * 0.8, y - radius * 0.30), (x + 2, y - radius * 0.42), (x - radius * 0.8, y - radius * 0.22))
    shapes = [Shape(crown, 9, colour), Shape(crown + fringe, 0, colour, outlined=False)]
    if person == "boy":
        shapes += [Shape(((x - 6, y - radius), (x + 8, y - radius - 11)), 11, colour)]
    if person == "man":
        shapes += [Shape(((x - 9, y + 12), (x, y + 9), (x + 9, y + 12)), 7, colour, outlined=False)]
    return shapes


def head_shapes(person: str, centre: Point, build: Build, palette: Palette, cheer: float) -> list[Shape]:
    """Head, eyes, cheeks, mouth and the hair in front. `cheer` in 0..1 opens the mouth."""
    x, y = centre
    dark = (40, 30, 36)
    eyes = [Shape(((x + s * 11, y - 2), (x + s * 11, y + 3)), 8, dark, outlined=False) for s in (-1, 1)]
    blush = (min(palette.skin[0] + 14, 255), int(palette.skin[1] * 0.76), int(palette.skin[2] * 0.74))
    cheeks = [Shape(((x + s * 20, y + 9),), 11, blush, outlined=False) for s in (-1, 1)]
    smile = Shape(((x - 7, y + 17), (x, y + 19 + 3 * cheer), (x + 7, y + 17)), 5 + 3 * cheer, (176, 44, 52),
                  outlined=False)
    face = [Shape((centre,), 2 * build.head, palette.skin)]
    return face + cheeks + eyes + [smile] + front_hair(person, centre, build.head, palette.hair)


def draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, fatten: float, fill: Colour | int) -> None:
    points, width = list(shape.points), shape.width + 2 * fatten
    if shape.width == 0:
        draw.polygon(points, fill=fill)
        if fatten:
            draw.line([*points, points[0]], fill=fill, width=round(2 * fatten))
        return
    if len(points) > 1:
        draw.line(points, fill=fill, width=round(width))
    for x, y in points:
        draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=fill)


def choose_limb(rng: np.random.Generator) -> str:
    """The limb that has the defect."""
    return str(rng.choice(["left_arm", "left_leg", "right_arm", "right_leg"]))


def count_parts(seed: int, defect: str | None) -> dict[str, int]:
    """WHOLE for the image that `render` draws with this seed and defect."""
    if defect in ("no_head", "two_heads"):
        return {**WHOLE, "heads": 0 if defect == "no_head" else 2}
    if defect not in ("missing_limb", "detached_limb", "extra_limb"):
        return WHOLE
    kind = "arms" if choose_limb(np.random.default_rng([seed, 2])).endswith("arm") else "legs"
    return {**WHOLE, "loose": int(defect == "detached_limb"), kind: 3 if defect == "extra_limb" else 1}


def break_limbs(limbs: dict[str, Limb], defect: str | None, build: Build, rng: np.random.Generator) -> dict[str, Limb]:
    """The limbs with one missing, torn off, or grown in addition; unchanged for any other defect."""
    name = choose_limb(rng)
    side_name, kind = name.split("_")
    side = -1 if side_name == "left" else 1
    if defect == "missing_limb":
        return {key: joints for key, joints in limbs.items() if key != name}
    if defect == "detached_limb":
        away = (side * float(rng.uniform(22, 34)), float(rng.uniform(-16, 20)))
        moved = [(x + away[0], y + away[1]) for x, y in limbs[name]]
        return {**limbs, name: (moved[0], moved[1], moved[2])}
    if defect == "extra_limb":
        root, middle, _ = limbs[name]
        angle = float(np.degrees(np.arctan2(side * (middle[0] - root[0]), middle[1] - root[1])))
        lengths = (build.upper_arm, build.forearm) if kind == "arm" else (build.thigh * 0.9, build.shin * 0.9)
        # Far enough from the real limb to be seen as one more.
        other = angle + 62 if angle < 70 else angle - 62
        grown = bend(root, (other, other + float(rng.normal(0, 12))), lengths, side)
        return {**limbs, f"{side_name}_extra_{kind}": grown}
    return limbs


def person_shapes(figure: Figure, seed: int, defect: str | None,
                  traits: Traits | None = None) -> tuple[list[Shape], Skeleton]:
    """All shapes of a person in drawing order, around the skeleton they belong to."""
    rng, harm = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
    build, palette = BUILDS[figure.person], choose_palette(figure, rng, traits)
    skeleton = build_skeleton(figure.person, figure.pose, rng)
    limbs = break_limbs(skeleton.limbs, defect, build, harm)
    cheer = float(rng.uniform(0, 0.6)) + 0.8 * (figure.pose in ("cheering", "jumping", "waving"))
    heads = head_centres(skeleton.head, build.head, defect)
    hair = [s for centre in heads for s in back_hair(figure.person, centre, build.head, palette.hair)]
    shapes = of_part("head", hair)
    if figure.pose == "sitting":
        x, y = build.hip + 10, 8.0
        stool = ((-x, y), (x, y), (x - 3, skeleton.ground), (-x + 3, skeleton.ground))
        shapes.append(Shape(stool, 0, (112, 106, 118)))
    parts = {"leg": [s for n in limbs if n.endswith("leg") for s in limb_shapes(n, limbs[n], build, palette)],
             "torso": torso_shapes(skeleton, build, palette) + (badge_shapes(skeleton, traits) if traits else []),
             "arm": [s for n in limbs if n.endswith("arm") for s in limb_shapes(n, limbs[n], build, palette)]}
    order = ("torso", "arm", "leg") if figure.pose == "sitting" else ("leg", "torso", "arm")
    shapes += [shape for part in order for shape in of_part(part, parts[part])]
    for centre in heads:
        shapes += of_part("head", head_shapes(figure.person, centre, build, palette, min(cheer, 1.0)))
    return shapes, skeleton


def of_part(part: str, shapes: list[Shape]) -> list[Shape]:
    return [replace(shape, part=part) for shape in shapes]


def head_centres(head: Point, radius: float, defect: str | None) -> list[Point]:
    if defect == "no_head":
        return []
    if defect == "two_heads":
        return [(head[0] - radius * 0.92, head[1] + 3), (head[0] + radius * 0.92, head[1] - 3)]
    return [head]


def place_shapes(shapes: list[Shape], skeleton: Skeleton, seed: int) -> tuple[list[Shape], Point]:
    """The shapes scaled, mirrored or not, and placed on the canvas; and the point of the floor under the person."""
    rng = np.random.default_rng([seed, 3])
    floor = float(rng.uniform(238, 248))
    height, half = skeleton.ground - skeleton.head[1] + 44, skeleton.reach + 18
    scale = min(float(rng.uniform(0.94, 1.06)), floor / height, CANVAS_PX / 2 / half)
    mirror = -1 if rng.random() < 0.5 else 1
    room = min(20.0, CANVAS_PX / 2 - scale * half)  # sideways, without leaving the canvas
    x0 = CANVAS_PX / 2 + room * float(rng.uniform(-1, 1))

    def place(point: Point) -> Point:
        return x0 + mirror * scale * point[0], floor + scale * (point[1] - skeleton.ground)

    placed = [replace(s, points=tuple(place(p) for p in s.points), width=s.width * scale) for s in shapes]
    return placed, (x0, floor)


def alter_figure(figure: Figure, seed: int, defect: str | None) -> Figure:
    """The figure that is really drawn: another one for the two defects that contradict the caption."""
    rng = np.random.default_rng([seed, 4])
    if defect == "wrong_colour":
        return change_attributes(figure, rng, names=(str(rng.choice(["top", "trousers", "hair"])),))
    if defect == "wrong_caption":
        return change_attributes(figure, rng)
    return figure


def render_with_mask(
    figure: Figure, seed: int, *, defect: str | None = None, size_px: int = 64, traits: Traits | None = None
) -> tuple[Image.Image, Image.Image]:
    """An image of the figure (RGB) and the mask of its person (mode L, 255 on the person), both `size_px` square.

    `defect` is None or one of `DEFECTS`; `wrong_colour` changes one colour, `wrong_caption` one to three attributes.
    `traits` are a certain person's; without them the skin is the seed's and there is no badge.
    The same arguments give the same pixels.
    """
    if defect is not None and defect not in DEFECTS:
        raise ValueError(f"defect must be None or one of {', '.join(DEFECTS)}; got {defect!r}")
    figure = alter_figure(figure, seed, defect)
    shapes, (x, y) = place_shapes(*person_shapes(figure, seed, defect, traits), seed)
    canvas = draw_scene(figure.place, np.random.default_rng([seed, 0]))
    mask = Image.new("L", canvas.size)
    draw, draw_mask = ImageDraw.Draw(canvas), ImageDraw.Draw(mask)
    shadow = tuple(int(c * 0.78) for c in canvas.getpixel((8, min(int(y), 255))))  # type: ignore[union-attr]
    draw.ellipse((x - 48, y - 8, x + 48, y + 7), fill=shadow)
    draw_person(draw, draw_mask, shapes)
    size = (size_px, size_px)
    return canvas.resize(size, Image.Resampling.BOX), mask.resize(size, Image.Resampling.BOX)


def draw_person(draw: ImageDraw.ImageDraw, draw_mask: ImageDraw.ImageDraw, shapes: list[Shape]) -> None:
    for shape in shapes:
        if shape.outlined:
            draw_shape(draw, shape, OUTLINE_PX, OUTLINE)
            draw_shape(draw_mask, shape, OUTLINE_PX, 255)
    for shape in shapes:
        draw_shape(draw, shape, 0, shape.colour)


def render(figure: Figure, seed: int, *, defect: str | None = None, size_px: int = 64) -> Image.Image:
    """An image of the figure, RGB, `size_px` square. See `render_with_mask`."""
    return render_with_mask(figure, seed, defect=defect, size_px=size_px)[0]


def render_parts(figure: Figure, seed: int, *, defect: str | None = None, cells: int = 8) -> np.ndarray:
    """The fraction of each cell of a `cells` x `cells` grid that each of PARTS covers: float32 `[cells,cells,4]`."""
    figure = alter_figure(figure, seed, defect)
    shapes, _ = place_shapes(*person_shapes(figure, seed, defect), seed)
    canvas = Image.new("L", (CANVAS_PX, CANVAS_PX))
    draw = ImageDraw.Draw(canvas)
    for shape in shapes:
        draw_shape(draw, shape, 0, PARTS.index(shape.part) + 1 if shape.part else 0)
    size = CANVAS_PX // cells
    grid = np.asarray(canvas).reshape(cells, size, cells, size)
    covered = [(grid == i + 1).mean(axis=(1, 3), dtype=np.float32) for i in range(len(PARTS))]
    return np.stack(covered, axis=-1)
