"""Checkpoints are written while the training goes on, and hold what it was when they began."""

import threading

import pytest
import torch
from training_cases import config, sft_config, train, train_images

from hgdpo_core.errors import StorageError
from hgdpo_core.storage import Store
from hgdpo_core.training.checkpoints import Checkpoint, Checkpoints


class Waiting(Store):
    """Writes the checkpoint of step 2 when it is allowed to."""

    def __init__(self, root: str):
        super().__init__(root)
        self.allowed, self.was_allowed = threading.Event(), []

    def put_folder(self, local, key):
        if key.endswith("step-2"):
            self.was_allowed.append(self.allowed.wait(10))
        super().put_folder(local, key)


@pytest.mark.parametrize("case", ["sft", "dpo"])
def test_steps_go_on_while_a_checkpoint_is_written_and_do_not_change_it(tmp_path, case):
    """It is the checkpoint of a training that ends at its step."""
    store = Waiting(str(tmp_path / "beside"))
    begin, settings, own = {"sft": (train_images, sft_config, {"ema_decay": 0.9}), "dpo": (train, config, {})}[case]
    begin(settings(max_steps=3, checkpoint_every=2, **own), checkpoints=Checkpoints(store, "c"),
          on_log=lambda row: store.allowed.set() if row["step"] == 3 else None)
    begin(settings(max_steps=2, **own), checkpoints=Checkpoints(Store(str(tmp_path / "alone")), "c"))
    beside, alone = (tmp_path / name / "c" / "step-2" for name in ("beside", "alone"))
    assert store.was_allowed == [True]
    assert (beside / "weights.safetensors").read_bytes() == (alone / "weights.safetensors").read_bytes()
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (beside, alone)]
    for state in states:
        state.pop("seconds")
        assert len(state["log"]) == 2
    torch.testing.assert_close(*states, rtol=0, atol=0)


class Failing(Store):
    def put_folder(self, local, key):
        raise StorageError(f"{key}: no room")


@pytest.mark.parametrize(("steps", "seen"), [(6, 4), (3, 3)])
def test_an_error_ends_the_training_at_the_next_checkpoint_or_at_the_end(tmp_path, steps, seen):
    rows = []
    with pytest.raises(StorageError, match="step-2: no room"):
        train_images(sft_config(max_steps=steps, checkpoint_every=2),
                     checkpoints=Checkpoints(Failing(str(tmp_path)), "c"), on_log=rows.append)
    assert [row["step"] for row in rows] == list(range(1, seen + 1))


def test_what_entries_share_stays_shared():
    table = torch.arange(3.0)
    taken = Checkpoint(1, {"weight": table[None].T}, {"states": [{"map": table}, {"map": table}], "log": [1]}).on_host()
    table += 1
    first, second = (state["map"] for state in taken.state["states"])
    assert first is second and first.tolist() == [0, 1, 2] and taken.state["log"] == [1]
    assert taken.weights["weight"].tolist() == [[0], [1], [2]]
