"""Training curves: in TensorBoard's own files, found beside the model, one curve over all attempts."""

import importlib.util
from pathlib import Path

import pytest
from accelerate.state import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hgdpo_core.config import SftConfig
from hgdpo_core.errors import ConfigError
from hgdpo_core.storage import Store
from hgdpo_core.training import trackers
from hgdpo_core.training.trackers import check_tracker, tracked


@pytest.fixture(autouse=True)
def _started():
    PartialState(cpu=True)  # as a training has before its first row


def follow(store, steps, name="tensorboard"):
    with tracked(name, store, "dpo-1", {"beta": 5.0}) as track:
        for step in steps:
            track({"step": step, "loss": 1.0 / step, "grad_norm": 2.0})


def curve(folder: Path):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}, len(events.Scalars("loss")), events.Tags()


def test_a_killed_and_resumed_training_is_one_curve(tmp_path, monkeypatch):
    follow(Store(str(tmp_path)), range(1, 6))
    monkeypatch.setattr("time.time", lambda real=trackers.time.time: real() + 5)  # file names carry the second
    follow(Store(str(tmp_path)), range(4, 8))  # the checkpoint was of step 3
    values, count, tags = curve(tmp_path / "models" / "dpo-1" / "tensorboard")
    assert values == pytest.approx({step: 1 / step for step in range(1, 8)}) and count == 7
    assert set(tags["scalars"]) == {"loss", "grad_norm"}


def test_a_store_elsewhere_gets_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "SEND_SECONDS", -1.0)
    store = Store("memory://bucket/root")
    with tracked("tensorboard", store, "dpo-1", {}) as track:
        track({"step": 1, "loss": 0.5})
        assert store.list("models/dpo-1/tensorboard")
        track({"step": 2, "loss": 0.25})
    store.get_folder("models/dpo-1/tensorboard", tmp_path)
    assert curve(tmp_path)[0] == {1: 0.5, 2: 0.25}


def test_others_go_by_name_and_run(tmp_path, monkeypatch):
    calls = []

    class Fake:
        def __init__(self, *args, **settings):
            calls.append((args, settings))

        def start(self):
            calls.append("start")

        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    monkeypatch.setattr(trackers, "LOGGER_TYPE_TO_CLASS", {"wandb": Fake, "mlflow": Fake})
    follow(Store(str(tmp_path)), [1], "wandb")
    settings = {"id": "dpo-1", "name": "dpo-1", "resume": "allow", "config": {"beta": 5.0}}
    assert calls == [(("hgdpo",), settings), "start", (1, {"loss": 1.0, "grad_norm": 2.0}), "finish"]
    calls.clear()
    follow(Store(str(tmp_path)), [1], "mlflow")
    assert calls[0] == (("dpo-1",), {}) and not (tmp_path / "models").exists()


def test_nothing_is_written_without_a_tracker_or_a_row(tmp_path):
    follow(Store(str(tmp_path)), [1, 2], None)
    follow(Store(str(tmp_path)), [])
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_installed_is_one_line():
    check_tracker(None)
    check_tracker("tensorboard")
    if importlib.util.find_spec("comet_ml") is None:
        with pytest.raises(ConfigError, match="tracker is comet_ml, but its package is not installed: pip install "
                                              "comet-ml, or set tracker to null"):
            check_tracker("comet_ml")
    with pytest.raises(ValueError, match="tracker"):
        SftConfig(batch_size=1, learning_rate=1.0, tracker="excel")
