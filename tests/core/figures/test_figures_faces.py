"""The finder of drawn faces: one in nearly every image, at its place, none where there is none."""

import numpy as np
from PIL import Image

from hgdpo_core.figures.faces import find_faces
from hgdpo_core.figures.identities import View, draw_people, draw_view
from hgdpo_core.figures.renderer import CANVAS_PX, Traits, person_shapes, place_shapes, render
from hgdpo_core.figures.scenes import SCENES, draw_scene


def views(count, seed=4):
    rng = np.random.default_rng(seed)
    people = draw_people("validation", rng)
    return [draw_view(person, rng) for person, _ in zip(people, range(count), strict=False)]


def head_of(view: View) -> tuple[float, float, float]:
    """Centre and radius in pixels of the image."""
    person = view.person
    figure, traits = person.figure(view.pose, view.place), Traits(person.skin, person.badge, person.badge_colour)
    shapes, _ = place_shapes(*person_shapes(figure, view.seed, None, traits), view.seed)
    discs = [shape for shape in shapes if shape.part == "head" and len(shape.points) == 1 and shape.outlined]
    head = max(discs, key=lambda shape: shape.width)
    scale = CANVAS_PX / 64
    return head.points[0][0] / scale, head.points[0][1] / scale, head.width / 2 / scale


def test_nearly_every_person_has_one_face_at_its_place():
    drawn = views(60)
    found = [find_faces(view.render()[0]) for view in drawn]
    assert sum(len(boxes) == 1 for boxes in found) >= 56
    for view, boxes in zip(drawn, found, strict=True):
        for left, top, width, height in boxes[:1]:
            x, y, radius = head_of(view)
            assert abs(left + width / 2 - x) < 1 and abs(top + height / 2 - y) < 1 and width == height
            assert 0.85 < width / 2.6 / radius < 1.15


def test_no_face_is_none_and_two_are_two():
    places = [draw_scene(place, np.random.default_rng(seed)) for place in SCENES for seed in range(3)]
    assert not any(find_faces(place.resize((64, 64))) for place in places)
    drawn = views(20)
    assert not any(find_faces(render(v.person.figure(v.pose, v.place), v.seed, defect="no_head")) for v in drawn)
    both = Image.new("RGB", (128, 64))
    both.paste(drawn[0].render()[0], (0, 0))
    both.paste(drawn[1].render()[0], (64, 0))
    assert len(find_faces(both.resize((64, 32)))) == 0  # too small
    twice = sum(len(find_faces(render(v.person.figure(v.pose, v.place), v.seed, defect="two_heads"))) == 2
                for v in drawn)
    assert twice >= 10


def test_boxes_are_in_pixels_of_the_image():
    image = views(1)[0].render()[0]
    (small,), (large,) = find_faces(image), find_faces(image.resize((256, 256), Image.Resampling.NEAREST))
    assert np.allclose(np.array(large) / 4, small)
    assert find_faces(Image.new("RGB", (3, 200))) == []
