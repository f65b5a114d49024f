"""The table of cheaper pools: each lever is measured against the whole pool, on the same prompts."""

import argparse

import pytest

from benchmarks import cost_levers


@pytest.mark.slow
def test_levers_of_two_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost_levers, "LEVERS", {
        cost_levers.WHOLE: {"pool.images_per_prompt": 4}, "one cut": {"pool.images_per_prompt": 4, "pool.race": "5:2"}})
    settings = ["prompts.limit=2", "evaluation.prompts.limit=3", "sft.max_steps=1", "dpo.max_steps=1",
                "dpo.batch_size=2"]
    options = argparse.Namespace(root=str(tmp_path), trainings=2, set=settings)
    whole, raced = (cost_levers.measure(name, changes, options) for name, changes in cost_levers.LEVERS.items())
    assert (whole.steps, raced.steps) == (40, 30) and 0 < raced.gap <= whole.gap * 1.001
    assert {name: gains.shape for name, gains in raced.gains.items()} == {"pickscore": (2, 3), "inspector": (2, 3)}
    capsys.readouterr()
    cost_levers.print_table([whole, raced])
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["1.00", "0.75"]
    assert len({line.count("|") for line in lines}) == 1
