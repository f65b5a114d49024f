"""InstantBooth adapters: off changes no bit, a concept changes the image, a LoRA stays beside them, what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
import tiny_adapters
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from hgdpo_core.config import InstantBoothConfig, PersonaliserConfig, PoolConfig, SamplerConfig, TargetConfig
from hgdpo_core.errors import InputError, ModelError
from hgdpo_core.images import decode_image
from hgdpo_core.models import find_model, load_backbone
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.models.instantbooth import CONFIG, ENCODER, WEIGHTS, ImageEncoder, save_instantbooth
from hgdpo_core.models.lora import add_lora
from hgdpo_core.models.personaliser import PERSONALISERS, find_adapter
from hgdpo_core.prompts import Sample
from hgdpo_core.prompts.concepts import read_concepts
from hgdpo_core.training.instantbooth import attach_new

SAMPLER = SamplerConfig(width=32, height=32, steps=3, guidance_scale=3.0)
POOL = PoolConfig(images_per_prompt=1, batch_size=4)
PROMPT = "a on woman in a red top"
# Of the tiny tokenizer's words, one that is a single token.
SETTINGS = InstantBoothConfig(concept_word="on")


def save_adapter(target, folder, *, trained: bool):
    """A new adapter for a target, or one with random weights and open gates."""
    torch.manual_seed(4)
    encoder = ImageEncoder(CLIPVisionModel(CLIPVisionConfig(**{**tiny_adapters.ENCODER, "patch_size": 8})))
    denoiser = attach_new(load_backbone(target, dtype="float32").denoiser, SETTINGS, encoder)
    if trained:
        for name, parameter in denoiser.concepts.named_parameters():
            torch.nn.init.constant_(parameter, 1.0) if name.endswith("gamma") else torch.nn.init.normal_(parameter)
    save_instantbooth(denoiser.concepts, encoder, folder)
    return folder


@pytest.fixture(scope="module")
def target(target_folder):
    return find_model(TargetConfig(source=str(target_folder), dtype="float32"))


@pytest.fixture(scope="module")
def folder(target, tmp_path_factory):
    return save_adapter(target, tmp_path_factory.mktemp("adapter"), trained=True)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return read_concepts(tiny_adapters.save_people(tmp_path_factory.mktemp("people"), 3)).concepts


def personal(target, folder, **settings):
    config = PersonaliserConfig(source=str(folder), crop=None, **settings)
    return replace(target, personaliser=find_adapter(config, target))


def generate(model, person, prompt=PROMPT):
    generator = ImageGenerator(model, SAMPLER, POOL, "cpu")
    generator.learn([person])
    (row,) = generator.generate([Sample(prompt, person.id)])
    return np.asarray(decode_image(row["image"])).astype(int)


def test_a_new_adapter_and_one_of_no_strength_change_no_bit(target, folder, people, tmp_path):
    new = save_adapter(target, tmp_path / "new", trained=False)
    plain = generate(target, people[0])
    assert (generate(personal(target, new, strength=1.0, token_strength=1.0), people[0]) == plain).all()
    assert (generate(personal(target, folder, strength=0, token_strength=0), people[0]) == plain).all()


def test_person_strength_and_token_strength_change_the_image(target, folder, people):
    given = [(people[0], {}), (people[1], {}), (people[0], {"strength": 1.0}), (people[0], {"token_strength": 1.0})]
    images = [generate(personal(target, folder, **settings), person) for person, settings in given]
    assert all((images[0] != other).any() for other in images[1:])
    assert (images[0] == generate(personal(target, folder, strength=0.3, token_strength=0.4), people[0])).all()


@pytest.mark.parametrize("syntax", ["plain", "a1111"])
def test_the_concept_is_where_its_word_is(target, folder, people, syntax):
    model = replace(personal(target, folder), prompt_syntax=syntax)
    text = load_backbone(model, dtype="float32").text
    text.learn(people[0].id, people[0].pictures())
    (found,) = text.encode([Sample("a red on woman", people[0].id)])
    tokens = text.text.token_ids(["a red on woman"])[0]
    assert found.extra["concept_places"][0].tolist() == [token == text.text.single_token("on") for token in tokens]
    assert int(found.extra["concept_places"].sum()) == 1
    assert not text.negative(found.length).extra["concept_places"].any()


def test_a_lora_lands_on_its_own_layers_and_changes_images(target, folder, people, target_folder, tmp_path):
    lora = tiny.save_random_lora(tmp_path, target_folder)
    model = personal(target, folder)
    images = [generate(m, people[0]) for m in (model, model.with_lora(lora, 1.0), model.with_lora(lora, 0.5))]
    assert all((a != b).any() for a, b in ((images[0], images[1]), (images[0], images[2]), (images[1], images[2])))
    own, adapted = load_backbone(target, dtype="float32").denoiser, load_backbone(target, dtype="float32").denoiser
    encoder = ImageEncoder.load(folder / ENCODER)
    adapted = attach_new(adapted, SETTINGS, encoder)
    for denoiser in (own, adapted):
        add_lora(denoiser.network, 4, 0, denoiser.lora_targets)
    layers = [{name for name, _ in denoiser.network.named_parameters() if "lora_" in name}
              for denoiser in (own, adapted)]
    assert layers[0] == layers[1] and len(layers[0]) > 0
    assert not any("fuser" in name for name in layers[1])


@pytest.mark.parametrize(("prompt", "message"), [("a woman in a red top", "has no word on")])
def test_a_prompt_without_the_word_is_refused(target, folder, people, prompt, message):
    with pytest.raises(ModelError, match=message):
        generate(personal(target, folder), people[0], prompt)


@pytest.mark.parametrize(("syntax", "lacking"), [("plain", 2), ("a1111", 1)])
def test_prompts_are_checked_as_the_model_reads_them_without_loading_it(target, folder, syntax, lacking, monkeypatch,
                                                                             tmp_path):
    """The text encoder reads 24 tokens of a plain prompt, and chunks of them of a weighted one."""
    monkeypatch.setattr("hgdpo_core.models.instantbooth.ImageEncoder", None)
    model = personal(target, folder).reading(syntax)
    kind, late = PERSONALISERS["instantbooth"], f"{'a man in a red top ' * 20}on"
    kind.check_prompts(model.personaliser, model, [PROMPT, "a (on:1.2) man", Sample("a on girl", "someone")])
    prompts = ["a woman", PROMPT, late]
    with pytest.raises(InputError, match=f"^{lacking} of 3 prompts have no word on .* the first is 'a woman'"):
        kind.check_prompts(model.personaliser, model, prompts)
    configs = tmp_path / "configs"
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(model.path / part, configs / part)
    file = configs / "text_encoder" / "config.json"
    kept = json.loads(file.read_text())
    del kept["max_position_embeddings"]  # 77, as some leave out
    file.write_text(json.dumps(kept))
    kind.check_prompts(model.personaliser, replace(model, configs=configs), [f"{'a man ' * 30}on"])
    PERSONALISERS["ip_adapter"].check_prompts(model.personaliser, model, prompts)


def test_other_widths_and_broken_files_are_refused(target, folder, tmp_path):
    def broken(name, change):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        change(copy)
        with pytest.raises(ModelError) as error:
            personal(target, copy)
        assert "\n" not in str(error.value)
        return str(error.value)

    def set_width(copy):
        config = json.loads((copy / CONFIG).read_text())
        (copy / CONFIG).write_text(json.dumps({**config, "text_width": 768}))

    def lose_a_tensor(copy):
        tensors = load_file(copy / WEIGHTS)
        save_file(dict(list(tensors.items())[1:]), copy / WEIGHTS)

    assert "768 wide" in broken("width", set_width)
    assert "lacks" in broken("tensor", lose_a_tensor)
    assert WEIGHTS in broken("weights", lambda copy: (copy / WEIGHTS).unlink())
    assert "no config" in broken("config", lambda copy: (copy / CONFIG).write_text('{"blocks": 1}'))
    encoder = {"hidden_size": 24, "patch_size": 8}
    assert "24 wide" in broken("encoder", lambda copy: CLIPVisionModel(CLIPVisionConfig(
        **{**tiny_adapters.ENCODER, **encoder})).save_pretrained(copy / ENCODER))


def test_a_word_of_several_tokens_or_none_is_refused(target):
    text = load_backbone(target, dtype="float32").text
    for word in ("woman's", "blue", "V"):
        with pytest.raises(ModelError, match="one token of its own"):
            text.single_token(word)
