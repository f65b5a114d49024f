"""`hgdpo evaluate` on tiny models and a real Prefect server: two models, several images per prompt, used again."""

import json
from pathlib import Path

import pytest
import tiny
import tiny_adapters
from diffusers import UNet2DConditionModel
from prefect.client.orchestration import get_client

from flows.cli import main
from flows.evaluate import hgdpo_evaluate
from hgdpo_core.scorers import pickscore
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

SETTINGS = {"target.dtype": "float32", "sampler.width": 32, "sampler.height": 32, "sampler.steps": 2,
            "pool.prompts_per_shard": 4}


@pytest.fixture(scope="module")
def parameters(tmp_path_factory, target_folder, judge_folder):
    folder = tmp_path_factory.mktemp("comparison")
    (folder / "prompts.txt").write_text("".join(f"a man in a blue top <b>{i}</b>\n" for i in range(6)))
    return {"root": str(folder / "root"), "target": str(target_folder), "images_per_prompt": 2,
            "tuned": str(tiny.save_target(folder / "other", seed=1)), "prompts": str(folder / "prompts.txt"),
            "scorers": [f"pickscore={judge_folder}"], "overrides": SETTINGS}


@pytest.fixture(scope="module")
def summary(server, parameters):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickscore, "DEFECT_BELOW", 0.0, raising=False)
        return hgdpo_evaluate(**parameters)


def test_the_summary_holds_what_was_measured(summary, parameters):
    rate, change = summary["win_rate"]["pickscore"], summary["score_change"]["pickscore"]
    assert rate["n"] == 6 == rate["wins"] + rate["losses"] + rate["ties"]
    assert change["mean"] == pytest.approx(change["tuned_mean"] - change["target_mean"])
    assert summary["images_per_prompt"] == 2 and summary["lora_weight"] is None
    assert set(summary["win_rate_bootstrap"]["pickscore"]) == {"ci_low", "ci_high"}
    assert summary["defect_rate"]["pickscore"]["n"] == 6
    assert set(summary["colour_shift"]) == {"hue", "saturation", "value", "hue_degrees"}
    assert set(summary["timings"]) == {"prepare", "evaluation_images", "evaluation"}
    folder = Path(parameters["root"]) / "runs" / summary["run_id"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    page = (folder / "report.html").read_text()
    assert "a man in a blue top &lt;b&gt;" in page and "<b>0</b>" not in page and "Defective images" in page
    assert "hgdpo evaluate" in page and "The first of a prompt" in page


def test_a_run_is_named_after_its_models(server, summary, parameters):
    with get_client(sync_client=True) as client:
        names = {run.name for run in client.read_flow_runs()}
    assert f"{Path(parameters['tuned']).name} against {Path(parameters['target']).name} {summary['run_id']}" in names


def test_both_models_got_the_same_seeds(summary, parameters):
    store = Store(parameters["root"])
    keys = [summary["artifacts"][name].removeprefix(f"{store.root}/") for name in ("target_images", "tuned_images")]
    seeds = [{(row["prompt"], row["index"]): row["seed"] for index in folder.manifests()
              for row in folder.read(index, ["prompt", "index", "seed"]).to_pylist()}
             for folder in (ShardFolder.open(store, key) for key in keys)]
    assert seeds[0] == seeds[1] and len(seeds[0]) == 12
    assert keys[0] != keys[1]


def test_a_second_run_finds_everything(summary, parameters):
    def files():
        return {p: p.stat().st_mtime_ns for p in Path(parameters["root"]).rglob("shard-*")}

    before = files()
    again = hgdpo_evaluate(**parameters)
    assert before and files() == before
    assert again["win_rate"] == summary["win_rate"] and again["run_id"] == summary["run_id"]


def test_the_command_plans_compares_and_publishes(server, summary, parameters, tmp_path, capsys):
    arguments = ["evaluate", "--root", parameters["root"], "--target", parameters["target"], "--tuned",
                 parameters["tuned"], "--prompts", parameters["prompts"], "--scorers", parameters["scorers"][0],
                 "--images-per-prompt", "2", *(f"--set={name}={json.dumps(v)}" for name, v in SETTINGS.items())]
    assert main([*arguments, "--plan"]) == 0
    assert "stage" in (text := capsys.readouterr().out) and "missing images" in text and "nothing was made" in text
    assert main([*arguments, "--plan", "--json"]) == 0
    assert [row["missing_images"] for row in json.loads(capsys.readouterr().out)] == [0, 0]
    assert main([*arguments, "--publish", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "pickscore: " in printed and str(tmp_path / "out" / "report.html") in printed
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["run_id"] == summary["run_id"]


def test_a_lora_is_tried_at_several_weights(server, parameters, target_folder, tmp_path):
    lora = tiny.save_random_lora(tmp_path / "lora", target_folder)
    summary = hgdpo_evaluate(**{**parameters, "tuned": str(lora), "lora_weight": 1.0, "lora_weights": [0.5]})
    sweep = summary["lora_weights"]
    assert [point["lora_weight"] for point in sweep] == [0.5, 1.0]
    assert sweep[1]["win_rate"] == summary["win_rate"]
    changes = [point["score_change"]["pickscore"]["mean"] for point in sweep]
    assert changes[0] != changes[1]
    assert len(Store(parameters["root"]).list_folders("evaluations")) >= 2
    page = (Path(parameters["root"]) / "runs" / summary["run_id"] / "report.html").read_text()
    assert ">LoRA weight</h2>" in page


def test_personalised_models_are_compared(server, parameters, target_folder, tmp_path, monkeypatch, capsys):
    judge = tiny_adapters.colour_judge(monkeypatch, tmp_path)
    tiny_adapters.save_encoder(tmp_path / "image_encoder")
    unet = UNet2DConditionModel.from_pretrained(target_folder / "unet")
    adapter = tiny_adapters.save_ip_adapter(tmp_path / "full-face.safetensors", unet, "full-face")
    people = tiny_adapters.save_people(tmp_path / "people", 2)
    lora = tiny.save_random_lora(tmp_path / "lora", target_folder)
    settings = {**SETTINGS, "concepts.personaliser.crop": None, "concepts.personaliser.strength": 0.8}
    assert main(["evaluate", "--root", parameters["root"], "--target", parameters["target"], "--tuned", str(lora),
                 "--prompts", parameters["prompts"], "--scorers", parameters["scorers"][0], "--lora-weights", "0.5",
                 "--concepts", str(people), "--personaliser", str(adapter), "--judges", judge, "--publish",
                 str(tmp_path / "out"), *(f"--set={name}={json.dumps(v)}" for name, v in settings.items())]) == 0
    printed = capsys.readouterr().out
    assert "figures: the person is nearer by the tuned model on " in printed and "identity" in printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["evaluation_prompts"] == 12 and summary["people"] == 2
    assert [set(point["identity"]) for point in summary["lora_weights"]] == [{"figures"}, {"figures"}]
    page = (tmp_path / "out" / "report.html").read_text()
    assert ">Identity</h2>" in page and "full-face.safetensors" in page


@pytest.mark.parametrize(("arguments", "message"), [
    (["--tuned", "/no/such/model"], "model /no/such/model does not exist"),
    (["--tuned", "figures"], "are the same model"),
    (["--tuned", "figures", "--lora-weight", "0.5"], "is a LoRA: leave it out"),
    (["--tuned", "figures", "--scorers", "beauty"], "scorers.0.name"),
])
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path):
    assert main(["evaluate", "--root", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("hgdpo: error: ") and error.count("\n") == 1
