"""Image files of a user, scored with their captions or one prompt."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TEXTS

from hgdpo_core.config import ScorerConfig
from hgdpo_core.errors import InputError, StoppedError
from hgdpo_core.rescore.score_images import images_to_score, score_images
from hgdpo_core.scorers import load_scorer


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.jpg").write_bytes(b"not an image")
    lines = [json.dumps({"file_name": f"{i}.{'jpg' if i == 3 else 'png'}", "text": TEXTS[i]}) for i in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_captions_or_one_prompt_for_all(folder):
    assert [image.caption for image in images_to_score(str(folder))] == TEXTS
    assert {image.caption for image in images_to_score(str(folder), "a man")} == {"a man"}
    assert [image.path.name for image in images_to_score(str(folder / "1.png"), "a man")] == ["1.png"]


@pytest.mark.parametrize(("location", "prompt", "message"), [
    ("1.png", None, "--prompt"), ("nowhere", None, "not a folder"), ("nowhere", "a man", "not a folder"),
    ("", " ", "prompt is empty"), ("empty", "a man", "holds no image")])
def test_mistakes_are_named(folder, location, prompt, message):
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        images_to_score(str(folder / location), prompt)


def test_scores_are_the_scorers_and_a_broken_file_is_named(folder, judge_folder):
    config = ScorerConfig(source=str(judge_folder), batch_size=2)
    calls = []
    scored = score_images(images_to_score(str(folder)), config, device="cpu",
                          progress=lambda done, total, unit: calls.append((done, total, unit)))
    opened = [Image.open(folder / f"{i}.png") for i in range(3)]
    alone = load_scorer("pickscore", source=str(judge_folder)).score(opened, TEXTS[:3])
    torch.testing.assert_close(torch.tensor([item.score for item in scored[:3]]), alone, rtol=0, atol=1e-4)
    assert math.isnan(scored[3].score) and "do not decode" in scored[3].problem
    assert [item.problem for item in scored[:3]] == [None] * 3
    assert calls == [(2, 4, "images"), (4, 4, "images")]
    with pytest.raises(StoppedError):
        score_images(images_to_score(str(folder)), config, device="cpu", should_stop=lambda: True)
