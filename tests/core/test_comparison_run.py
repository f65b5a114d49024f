"""Two models compared: what each kind of model and setting means, and what is refused."""

import json

import ldm
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from hgdpo_core.config import TargetConfig
from hgdpo_core.config.presets import figures
from hgdpo_core.errors import ConfigError, HGDPOError, InputError, ModelError
from hgdpo_core.figures import target_path
from hgdpo_core.models import find_model, load_pipeline
from hgdpo_core.models.files import is_lora
from hgdpo_core.models.locations import find_located_model, model_locations
from hgdpo_core.run.comparison import open_comparison, plan_comparison
from hgdpo_core.storage import Store


@pytest.fixture(scope="module")
def lora(target_folder, tmp_path_factory):
    return tiny.save_random_lora(tmp_path_factory.mktemp("lora"), target_folder)


@pytest.fixture
def compare(tmp_path, target_folder, judge_folder):
    (tmp_path / "prompts.txt").write_text("a woman\na man\na woman\n")
    given = {"root": str(tmp_path / "root"), "target": str(target_folder), "prompts": str(tmp_path / "prompts.txt"),
             "scorers": [f"pickscore={judge_folder}"], "overrides": {"target.dtype": "float32"}}
    return lambda **settings: open_comparison(**{**given, **settings})


def test_a_lora_is_tried_at_several_weights(compare, lora):
    run = compare(tuned=str(lora), lora_weight=0.7, lora_weights=[1.0, 0.25, 0.7])
    assert [model.lora and model.lora.weight for model in run.sweep] == [0.25, 0.7, 1.0]
    assert run.sweep[1] == run.tuned
    assert [row["stage"] for row in plan_comparison(run)] == ["target", "tuned", "LoRA weight 0.25", "LoRA weight 1"]
    assert "--lora-weights 1.0,0.25,0.7" in run.command
    plain = compare(tuned=str(lora), lora_weight=0.7)
    assert plain.sweep == () and plain.run_id != run.run_id


def test_a_lora_is_told_from_a_model(lora, target_folder, tmp_path):
    file = lora / "pytorch_lora_weights.safetensors"
    assert is_lora(lora) and is_lora(file)
    assert not is_lora(target_folder) and not is_lora(target_folder / "unet" / "diffusion_pytorch_model.safetensors")
    layer = "lora_unet_down_blocks_0_attentions_0"  # as kohya names it
    kohya = {f"{layer}.lora_down.weight": torch.ones(1), f"{layer}.alpha": torch.ones(1)}
    save_file(kohya, tmp_path / "style.safetensors")
    assert is_lora(tmp_path / "style.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678nothing")
    with pytest.raises(ModelError, match="no whole safetensors header"):
        is_lora(tmp_path / "broken.safetensors")


def test_a_lora_is_worn_by_the_target(compare, lora):
    run = compare(tuned=str(lora), lora_weight=0.7)
    assert run.target.lora is None and run.tuned.fingerprint == run.target.fingerprint
    assert run.tuned.lora is not None and run.tuned.lora.weight == 0.7
    assert run.evaluation_prompts.prompts == ("a woman", "a man")
    assert run.config.evaluation.lora_weight == 0.7
    assert compare(tuned=str(lora / "pytorch_lora_weights.safetensors")).tuned.lora.weight == 1.0  # the preset's


def test_two_weights_of_one_lora(compare, lora, target_folder):
    run = compare(tuned=str(lora), target=str(lora), base=str(target_folder), lora_weight=1.0, target_lora_weight=0.5)
    assert run.target.lora is not None and run.tuned.lora is not None
    assert (run.target.lora.weight, run.tuned.lora.weight) == (0.5, 1.0)
    assert run.target.identity() != run.tuned.identity()


def test_two_models_have_no_weight_and_share_the_targets_settings(compare, target_folder, tmp_path):
    other = tiny.save_target(tmp_path / "other", seed=1)
    run = compare(tuned=str(other), overrides={"target.dtype": "float32", "target.negative_prompt": "blurry"})
    assert run.tuned.lora is None and run.tuned.fingerprint != run.target.fingerprint
    assert run.tuned.negative_prompt == run.target.negative_prompt == "blurry"
    rows = plan_comparison(run)
    assert [(row["stage"], row["images"], row["missing_images"]) for row in rows] == [("target", 2, 2), ("tuned", 2, 2)]
    assert rows[0]["pool_id"] != rows[1]["pool_id"]


def test_settings_of_a_single_file_are_not_those_of_the_folder_it_is_compared_with(compare, tmp_path):
    folder = tmp_path / "sd15"
    pipeline = tiny.sd15_shaped(folder)
    pipeline.save_pretrained(folder)
    file = ldm.save_single_file(pipeline, tmp_path / "style.safetensors")
    pipeline.unet.conv_out.bias.data += 1
    pipeline.save_pretrained(tmp_path / "tuned")
    of_file = {"target.dtype": "float32", "target.component_configs": str(folder),
               "target.prediction_type": "v_prediction"}
    run = compare(target=str(file), tuned=str(tmp_path / "tuned"), overrides=of_file)
    assert run.target.schedule() == {"prediction_type": "v_prediction"} and run.target.configs == folder
    assert run.tuned.schedule() == {} and run.tuned.configs is None
    lora = tiny.save_random_lora(tmp_path / "lora", folder)
    with_lora = compare(target=str(file), tuned=str(lora), overrides=of_file).tuned
    assert with_lora.configs == folder and with_lora.schedule() == run.target.schedule()


def test_settings_reach_the_config_and_the_command(compare, lora, judge_folder):
    run = compare(tuned=str(lora), images_per_prompt=3)
    assert run.config.evaluation.images_per_prompt == 3
    assert [(scorer.name, scorer.source) for scorer in run.config.evaluation.scorers] == [
        ("pickscore", str(judge_folder))]
    for words in (f"hgdpo evaluate --preset figures --root {run.store.root}", f"--tuned {lora}",
                  "--images-per-prompt 3", f"--scorers pickscore={judge_folder}", "--set 'target.dtype=\"float32\"'"):
        assert words in run.command
    assert run.store.read_json(run.key("config.json"))["tuned"] == str(lora)


def test_a_scorer_by_name_is_the_presets(compare, lora):
    run = compare(tuned=str(lora), scorers=["pickscore"])
    assert run.config.evaluation.scorers[0].source == "figures" and run.config.evaluation.scorers[0].batch_size == 64
    assert compare(tuned=str(lora), scorers=None).config.evaluation.scorers == figures().evaluation.scorers


def test_the_figures_preset_needs_nothing_but_a_lora(tmp_path):
    lora = tiny.save_random_lora(tmp_path / "lora", target_path())
    run = open_comparison(tuned=str(lora), root=str(tmp_path), overrides={"evaluation.prompts.limit": 4})
    assert len(run.evaluation_prompts.prompts) == 4 and run.config.target.source == "figures"


@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"tuned": None}, InputError, "give tuned"),
    ({"tuned": "/no/such/model"}, ModelError, "model /no/such/model does not exist"),
    ({"tuned": "TARGET"}, InputError, "are the same model"),
    ({"tuned": "TARGET", "lora_weight": 0.5}, ConfigError, "neither .* is a LoRA: leave it out"),
    ({"tuned": "TARGET", "base": "TARGET"}, ConfigError, "base is .* leave it out"),
    ({"tuned": "LORA", "target_lora_weight": 0.5}, ConfigError, "is not a LoRA: leave it out"),
    ({"tuned": "figures", "overrides": {"sampler.latent_normalisation": True}}, ConfigError, "is not a LoRA: only"),
    ({"tuned": "LORA", "target": "LORA"}, InputError, "give base"),
    ({"tuned": "LORA", "lora_weight": -1.0}, ConfigError, "lora_weight"),
    ({"tuned": "LORA", "lora_weights": [0.5, 0.0]}, ConfigError, "lora_weights"),
    ({"tuned": "figures", "lora_weights": [0.5]}, ConfigError, "is not a LoRA: leave it out"),
    ({"tuned": "LORA", "scorers": ["beauty"]}, ConfigError, "scorers.0.name"),
    ({"tuned": "LORA", "scorers": ["pickscore", "pickscore"]}, ConfigError, "name each once"),
    ({"tuned": "LORA", "overrides": {"dpo.beta": 1}}, ConfigError, "'dpo.beta' is not a setting"),
    ({"tuned": "LORA", "overrides": {"pool.seed": 1}}, ConfigError, "'pool.seed' is not a setting"),
    ({"tuned": "LORA", "preset": "sd15", "target": None}, ConfigError, "give target"),
    ({"tuned": "LORA", "prompts": "nowhere.txt"}, InputError, "no prompt file"),
])
def test_mistakes_are_one_line(compare, lora, target_folder, settings, error, message):
    places = {"TARGET": str(target_folder), "LORA": str(lora)}
    settings = {name: places.get(value, value) if isinstance(value, str) else value for name, value in settings.items()}
    with pytest.raises(HGDPOError, match=message) as caught:
        compare(**settings)
    assert isinstance(caught.value, error) and "\n" not in str(caught.value)


def test_a_lora_is_no_target_of_a_run(lora):
    with pytest.raises(ModelError, match="is a LoRA: expected a whole model"):
        find_model(TargetConfig(source=str(lora / "pytorch_lora_weights.safetensors")))


def test_a_lora_for_another_model_is_one_line(compare, lora, tmp_path):
    weights = load_file(lora / "pytorch_lora_weights.safetensors")
    save_file({name: torch.cat([tensor, tensor], dim=-1) for name, tensor in weights.items()},
              tmp_path / "wide.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in weights.items()}, tmp_path / "elsewhere.safetensors")
    for name, message in (("wide", "expected two matrices of one rank"), ("elsewhere", "has no layer of this model")):
        with pytest.raises(ModelError, match=message) as error:
            compare(tuned=str(tmp_path / f"{name}.safetensors"))
        assert "\n" not in str(error.value)


def test_a_file_and_its_folder_are_the_same_model(compare, lora):
    folder, file = (compare(tuned=str(path)).tuned for path in (lora, lora / "pytorch_lora_weights.safetensors"))
    assert folder.identity() == file.identity()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    weights = [load_pipeline(model).unet.state_dict()[name] for model in (folder, file)]
    torch.testing.assert_close(*weights)


def test_a_lora_file_reaches_workers_through_the_store(compare, lora, tmp_path):
    file = tmp_path / "mine" / "style.safetensors"
    file.parent.mkdir()
    file.write_bytes((lora / "pytorch_lora_weights.safetensors").read_bytes())
    run = compare(tuned=str(file))
    means = json.loads(json.dumps(model_locations(run.store, run.tuned, copy_to_store=True)))
    file.unlink()
    found = find_located_model(run.store, run.tuned.identity(), means)
    assert found.identity() == run.tuned.identity()
    load_pipeline(found)


def test_how_work_is_cut_changes_no_id(compare, lora):
    other = compare(tuned=str(lora), overrides={"target.dtype": "float32", "workers.draw_images_per_run": 7})
    assert other.run_id == compare(tuned=str(lora)).run_id and other.config.workers.draw_images_per_run == 7


def test_nothing_is_left_by_a_mistake(compare, tmp_path):
    with pytest.raises(InputError):
        compare(tuned=None)
    assert Store(str(tmp_path / "root")).list_folders() == []
