"""The drawings: repeatable, and every defect visible."""

import json

import numpy as np
import pytest
from PIL import Image

from hgdpo_core.figures import DEFECTS, Figure, caption, parse_caption, render, sample_figure
from hgdpo_core.figures.dataset import to_model_range, to_pixels, write_image_folder
from hgdpo_core.figures.people import POSES, split_of
from hgdpo_core.figures.renderer import render_with_mask
from hgdpo_core.figures.skeleton import POSES as POSE_ANGLES

FIGURE = Figure("girl", "pink", "yellow", "blue", "cheering", "in the snow")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_seed_repeats_its_image_and_another_does_not():
    assert (pixels(render(FIGURE, 5)) == pixels(render(FIGURE, 5))).all()
    assert (pixels(render(FIGURE, 5)) != pixels(render(FIGURE, 6))).any()


def test_size_and_mode():
    image, mask = render_with_mask(FIGURE, 0, size_px=128)
    assert (image.mode, image.size, mask.mode, mask.size) == ("RGB", (128, 128), "L", (128, 128))
    assert render(FIGURE, 0).size == (64, 64)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_changes_a_visible_part_of_the_image(defect):
    rng = np.random.default_rng(0)
    for seed in range(25):
        figure = sample_figure(rng)
        difference = np.abs(pixels(render(figure, seed)) - pixels(render(figure, seed, defect=defect))).max(-1)
        # A walking leg or a boy's hair is the smallest thing a defect can touch.
        assert (difference > 24).sum() >= 8, (caption(figure), seed)


def test_defects_of_the_body_leave_the_place_alone():
    for defect in ("missing_limb", "no_head", "wrong_colour"):
        right, mask = render_with_mask(FIGURE, 9)
        other, other_mask = render_with_mask(FIGURE, 9, defect=defect)
        outside = (pixels(mask) == 0) & (pixels(other_mask) == 0)
        assert (pixels(right)[outside] == pixels(other)[outside]).all()


def test_an_unknown_defect_is_refused():
    with pytest.raises(ValueError, match="defect must be None or one of"):
        render(FIGURE, 0, defect="sixth_finger")


def test_a_person_fills_much_of_the_frame_and_stays_inside():
    rng = np.random.default_rng(2)
    for seed in range(60):
        mask = pixels(render_with_mask(sample_figure(rng), seed)[1]) > 127
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert rows[-1] - rows[0] >= 30
        assert columns[0] >= 0 and columns[-1] <= 63 and 0.07 < mask.mean() < 0.55
        assert not mask[:, 0].all() and not mask[:, -1].all()


def test_every_pose_of_the_captions_has_angles():
    assert set(POSES) == set(POSE_ANGLES)


def test_the_image_folder_is_what_users_bring(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 6, seed=1)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(split_of(row["text"]) == "train" for row in rows)
    assert all(parse_caption(row["text"]) for row in rows)
    with Image.open(folder / rows[0]["file_name"]) as image:
        assert image.size == (64, 64)


def test_pixels_survive_the_range_of_the_model():
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    assert (to_pixels(to_model_range(images)) == images).all()
