"""The benchmark of a DPO step at its tiny size: the public example's losses are ours, step by step."""

import os

import pytest

from benchmarks import dpo_step


@pytest.mark.slow
def test_both_sides_have_the_same_losses(capsys, monkeypatch):
    monkeypatch.setenv("HGDPO_DEVICE", os.environ.get("HGDPO_DEVICE", "cpu"))  # the script sets it
    options = ["--size", "tiny", "--dtype", "float32", "--batch", "2", "--steps", "1", "--threads", "1", "--turns", "1"]
    assert dpo_step.main(options) == 0
    printed = capsys.readouterr().out
    assert "1 steps measured; SML costs" in printed and "in float32 the losses differ by" in printed
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in rows] == ["public example", "ours without SML", "ours with SML",
                                        "ours with SML, gradient checkpointing"]
    assert rows[0][2] == "1.00x" and all(float(row[1]) > 0 for row in rows)
    assert 0 < float(rows[1][5]) < 1e-3


def test_a_loss_that_differs_is_seen():
    first, other = dpo_step.Row("a", 1.0, [0.7, 0.5]), dpo_step.Row("b", 0.5, [0.7, 0.55])
    assert dpo_step.largest_difference(other, first) == pytest.approx(0.1)
    assert dpo_step.format_table([first, other]).splitlines()[3].startswith("| b | 0.5 | 2.00x | - | - | 0.1")
