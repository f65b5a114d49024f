"""The validation images of a running training are shown in the UI as they appear, each once."""

import numpy as np
import pytest

from hgdpo_core.config import SamplerConfig
from hgdpo_core.images import encode_image
from hgdpo_core.storage import Store
from hgdpo_core.training.request import TrainRequest
from hgdpo_core.training.validation import Validation
from tasks import validation


@pytest.fixture
def shown(monkeypatch):
    calls = []
    monkeypatch.setattr(validation, "show_image", lambda key, image, description: calls.append((key, description)))
    monkeypatch.setattr(validation, "LOOK_SECONDS", -1.0)
    monkeypatch.setattr(validation, "result_id", lambda request: "dpo-1")
    return calls


def write(store: Store, step: int) -> None:
    folder = f"models/dpo-1/validation/step-{step:06d}"
    store.write_bytes(f"{folder}/0.png", encode_image(np.full((8, 8, 3), step, np.uint8), "png"))
    store.write_json(f"{folder}/images.json", {"step": step, "prompts": ["a woman"]})


def request(root, images: bool) -> TrainRequest:
    settings = Validation(prompts=("a woman",), prompt_syntax="plain", sampler=SamplerConfig(), seed=0, lora_weight=1.0)
    return TrainRequest(root=Store(str(root)).root, kind="dpo", latents="latents/x", shards="0", model={}, locations={},
                        config={}, validation=settings if images else None, code_version="1", format_version=1)


def test_new_images_are_shown_once(tmp_path, shown):
    store, reported = Store(str(tmp_path)), []
    with validation.showing_validation(request(tmp_path, True), lambda *at: reported.append(at)) as progress:
        progress(0, 20, "steps")
        write(store, 0)
        progress(5, 20, "steps")
        progress(6, 20, "steps")
        write(store, 10)
        progress(15, 20, "steps")
        write(store, 20)
    assert reported == [(0, 20, "steps"), (5, 20, "steps"), (6, 20, "steps"), (15, 20, "steps")]
    assert shown == [("dpo-validation", f"dpo in training, up to step {step}") for step in (0, 10, 20)]


def test_a_training_without_images_looks_for_none(tmp_path, shown):
    write(Store(str(tmp_path)), 0)
    with validation.showing_validation(request(tmp_path, False), print) as progress:
        assert progress is print
    assert shown == []
