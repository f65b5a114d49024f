"""Two processes of `accelerate launch` on the CPU train as one does: same losses, same weights, same after a stop.

Float32, learning rate 1e-2. Sums are taken in another order, so losses agree to 1e-4 of themselves, and weights to
2e-3 of themselves or 2e-4 (a gradient near zero may take Adam's first steps another way).
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from training_cases import Pairs, all_weights, config, sft_config, train, train_images, weights

from hgdpo_core.errors import StoppedError
from hgdpo_core.storage import Store
from hgdpo_core.training.checkpoints import Checkpoints
from hgdpo_core.training.launch import launch_command
from hgdpo_core.training.processes import part_of

TESTS = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two processes have been here, after one that was stopped after step 2 of three trainings."""
    location = tmp_path_factory.mktemp("exchange")
    for name, batch in (("four", 4), ("three", 3), ("one", 1)):
        asked = iter([False, False, True])
        with pytest.raises(StoppedError):
            train(config(batch_size=batch), checkpoints=Checkpoints(Store(str(location)), name),
                  should_stop=lambda asked=asked: next(asked))
    shutil.copytree(location / "four", location / "four-kept")
    command = [*launch_command(2), str(TESTS / "two_processes.py"), str(location)]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1",
                                       "HGDPO_DEVICE": "cpu"}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return location


@pytest.fixture(scope="module")
def results(folder):
    return torch.load(folder / "results.pt", weights_only=True)


def assert_same(result, whole):
    """A result of two processes equals (weights, TrainingResult) of one."""
    flat, one = whole
    names = ("loss", "winner_error", "grad_norm") if "winner_error" in one.log[0] else ("loss", "grad_norm")
    for name in names:
        assert [row[name] for row in result["log"]] == pytest.approx([row[name] for row in one.log], rel=1e-4)
    torch.testing.assert_close(result["weights"], flat, rtol=2e-3, atol=2e-4)
    assert result["global_batch"] == one.global_batch


def alone(pairs=None, **settings):
    unet, result = train(config(**settings), pairs)
    return weights(unet), result


def test_losses_and_weights_are_those_of_one_process_with_the_same_global_batch(results):
    assert_same(results["plain"], alone(batch_size=4))


def test_a_global_batch_is_the_same_on_any_number_of_processes(results):
    """And so is the id: the setting, not what came of it, is in the config."""
    assert_same(results["global"], alone(batch_size=2, global_batch_size=6))
    assert_same(results["global"], alone(batch_size=6))


def test_so_they_are_with_accumulation_and_flips(results):
    assert_same(results["flips"], alone(batch_size=8, flip=True))
    assert alone(batch_size=8)[1].log[0]["winner_error"] != results["flips"]["log"][0]["winner_error"]


def test_so_is_a_fine_tuning(results):
    unet, one = train_images(sft_config(batch_size=2, caption_dropout=0.5, flip=True))
    two = results["sft"]
    assert [row["loss"] for row in two["log"]] == pytest.approx([row["loss"] for row in one.log], rel=1e-4)
    assert (two["weights"] - all_weights(unet)).abs().mean() < 1e-6


def test_a_stopped_training_goes_on_bit_by_bit(results):
    assert "after step 2 of 4: step 2 is kept" in results["stopped"]
    assert results["resumed"]["resumed_from"] == 2 and results["resumed"]["log"] == results["plain"]["log"]
    assert torch.equal(results["resumed"]["weights"], results["plain"]["weights"])


@pytest.mark.parametrize(("name", "batch"), [("four", 4), ("three", 3), ("one", 1)])
def test_more_processes_continue_with_the_same_global_batch(results, name, batch):
    """Shares of 2 and 2, of 1 and 2, and of none and 1 of a step's samples."""
    continued = results[f"from {name}"]
    assert continued["resumed_from"] == 2
    assert_same(continued, alone(batch_size=batch))


def test_fewer_processes_continue_with_the_same_global_batch(folder, results, caplog):
    unet, result = train(config(batch_size=2), checkpoints=Checkpoints(Store(str(folder)), "two-kept"))
    assert result.resumed_from == 2 and result.global_batch == 4
    assert_same({**results["plain"]}, (weights(unet), result))
    assert "goes on with 1 process instead of 2. The batch of a step stays 4" in caplog.text


def test_what_changes_is_said(results):
    assert len(results["warnings"]) == 3
    assert "goes on with 2 processes instead of 1. The batch of a step stays 3" in results["warnings"][1]
    assert "up to 2 samples a step, 2 at a time" in results["warnings"][1]


def test_a_process_out_of_memory_lowers_the_micro_batch_of_all(results):
    assert_same(results["starved"], alone(Pairs(20), batch_size=8))
    said = results["starved"]["warnings"]
    assert ["2 at a time" in said[0], "1 at a time" in said[1], len(said)] == [True, True, 2]
    assert "out of memory at step 1 with one sample at a time" in results["empty"]


def test_so_it_is_in_bf16_without_autocast(results):
    """Up to its own rounding, which beta and the optimizer multiply from the second step on."""
    _, one = alone(Pairs(20), batch_size=8, mixed_precision="bf16", autocast=False)
    log = results["pure bf16"]["log"]
    for name in ("winner_error", "grad_norm"):
        assert log[0][name] == pytest.approx(one.log[0][name], rel=1e-3)
    assert [row["winner_error"] for row in log] == pytest.approx([row["winner_error"] for row in one.log], rel=1e-2)


def test_processes_wait_longer_than_torch_would_for_the_first_which_alone_uses_the_store(results):
    """Torch's default is 2 s here; the first process reads a checkpoint for 4 s, writes one and validates as long."""
    slow = results["slow"]
    assert slow["resumed_from"] == 2 and slow["uses"] == [["read", "write"], []] and slow["validated"] == [4]
    assert_same(slow, alone(batch_size=4))


def test_parts_are_whole_and_even():
    for size, processes in ((16, 4), (16, 3), (5, 4), (2, 3)):
        parts = [part_of(range(7, 7 + size), processes, index) for index in range(processes)]
        assert [k for part in parts for k in part] == list(range(7, 7 + size))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
