"""The training command, at a scale where it learns nothing but takes every branch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from hgdpo_core.figures.__main__ import main
from hgdpo_core.figures.make.judge import preference_loss
from hgdpo_core.figures.make.loop import Plan, rate_at, train
from hgdpo_core.figures.make.stages import STAGES, Run, run_stages


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    folder = tmp_path_factory.mktemp("figures")
    return ["--output", str(folder / "weights"), "--scale", "0.0005"], list(STAGES)


def test_the_command_trains_everything_and_then_has_nothing_to_do(trained):
    arguments, stages = trained
    assert main([*arguments, "--stages", "tokenizer,vae"]) == ["tokenizer", "vae"]
    # As if killed here: what is done is skipped, what follows still runs.
    assert main(arguments) == stages[2:]
    assert main(arguments) == []
    weights = Path(arguments[1])
    pipeline = StableDiffusionPipeline.from_pretrained(weights / "target")
    assert pipeline.unet.config["cross_attention_dim"] == 128
    card = (weights / "README.md").read_text()
    assert "PSNR" in card and "two_heads" in card and "validation prompts" in card and "Inspector" in card
    assert "## Labeller" in card and "**stand-in**" in card
    assert (weights / "judge" / "preprocessor_config.json").exists()
    assert not list(weights.rglob("checkpoint*"))
    assert not list((weights / "foreign" / "vae").glob("*.safetensors"))  # the target's is shared


def test_another_seed_is_another_training(trained):
    arguments, _ = trained
    assert main([*arguments, "--stages", "vae", "--seed", "1"]) == ["vae"]


def test_stages_out_of_order_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stages"):
        run_stages(Run(tmp_path / "weights", tmp_path / "work", scale=0.001), ("judge",))
    with pytest.raises(ValueError, match="stages must be among"):
        run_stages(Run(tmp_path / "weights", tmp_path / "work"), ("unet",))


def small_problem(plan: Plan, checkpoint: Path, stop_at: int | None = None) -> tuple[nn.Module, list[float]]:
    """Fit a line; `stop_at` raises in the middle of that step, as a kill would."""
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    seen: list[float] = []

    def loss_of(rng: np.random.Generator, generator: torch.Generator) -> torch.Tensor:
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=generator)
        seen.append(float(x[0, 0]))
        return (module(x) - x.sum(-1, keepdim=True)).float().square().mean()

    return train(module, loss_of, plan, name="line", seed=4, checkpoint=checkpoint), seen


def test_a_killed_training_resumes_bit_for_bit(tmp_path):
    plan = Plan(steps=30, batch=8, learning_rate=0.05, checkpoint_seconds=0)
    whole, batches = small_problem(plan, tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        small_problem(plan, tmp_path / "killed.pt", stop_at=17)
    resumed, rest = small_problem(plan, tmp_path / "killed.pt")
    assert rest == batches[17:]
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_learning_rate_rises_and_falls():
    plan = replace(STAGES["target"].plan, steps=1000, warm_up=100, learning_rate=1.0)
    rates = [rate_at(step, plan) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (99, 100) and rates[-1] == pytest.approx(0.02, abs=1e-4)


def test_the_preference_loss_is_log_2_without_a_preference_and_falls_with_one():
    scores = torch.tensor([0.0, 5.0])
    assert preference_loss(scores, scores).tolist() == pytest.approx([np.log(2)] * 2)
    right, other = torch.tensor([2.0]), torch.tensor([1.0])
    # -log softmax([2, 1])[0] = log(1 + e^-1)
    assert preference_loss(right, other).item() == pytest.approx(0.31326169)
    assert preference_loss(other, right).item() == pytest.approx(1.31326169)
