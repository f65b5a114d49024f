"""`hgdpo personalise` in the figures setting, and `hgdpo evaluate --concepts` with the adapter that it trained."""

import json

import pytest
import tiny

from flows.cli import main
from flows.personalise import hgdpo_personalise
from hgdpo_core import built_in
from hgdpo_core.figures import target_path
from hgdpo_core.models.personaliser import PERSONALISERS

SETTINGS = {"instantbooth.max_steps": 2, "instantbooth.batch_size": 2, "instantbooth.warmup_steps": 0}
FAST = {"sampler.steps": 2, "evaluation.scorers": "pickscore=figures", "concepts.prompts_per_concept": 2}


def options(settings):
    return [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(built_in, "PEOPLE_IMAGES", 12)
    monkeypatch.setattr(built_in, "PEOPLE", 2)


def test_an_adapter_is_trained_and_used(server, few, tmp_path, capsys):
    root = ["--root", str(tmp_path / "root")]
    command = ["personalise", *root, *options(SETTINGS)]
    assert main([*command, "--plan"]) == 0
    assert "latents of people" in capsys.readouterr().out
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Images of people: 12 used of 12" in printed or "Refused: " in printed
    adapter, = (tmp_path / "root" / "models").glob("instantbooth-*")
    assert PERSONALISERS["instantbooth"].recognises(adapter) and f"--personaliser {adapter}" in printed
    assert main([*command, "--plan", "--json"]) == 0
    assert [row["missing_shards"] for row in json.loads(capsys.readouterr().out)] == [0, 0]
    lora = tiny.save_random_lora(tmp_path / "lora", target_path())
    assert main(["evaluate", *root, "--tuned", str(lora), "--concepts", "figures", "--personaliser", str(adapter),
                 "--publish", str(tmp_path / "out"), *options(FAST)]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["people"] == 2 and summary["evaluation_prompts"] == 4 and set(summary["identity"]) == {"figures"}


def test_the_flow_returns_its_summary_and_finds_what_is_made(server, few, tmp_path):
    given = {"root": str(tmp_path / "root"), "overrides": SETTINGS}
    first, again = hgdpo_personalise(**given), hgdpo_personalise(**given)
    assert first["images"] == 12 == first["used"] + sum(first["refused"].values())
    assert first["adapter_id"] == again["adapter_id"] and first["found"] == [] and "adapter" in again["found"]
    kept = json.loads((tmp_path / "root" / "runs" / first["run_id"] / "summary.json").read_text())
    assert kept == again and kept["steps"] == 2
    assert hgdpo_personalise(**given, plan_only=True)["plan"][0]["missing_shards"] == 0


def test_bad_input_is_one_line(tmp_path, capsys):
    for arguments, message in ((["--preset", "sdxl"], "trains no adapter"), (["--run", "none"], "has no config.json"),
                               (["--images", str(tmp_path / "no")], "is not a folder")):
        assert main(["personalise", "--root", str(tmp_path), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("hgdpo: error: ") and error.count("\n") == 1
