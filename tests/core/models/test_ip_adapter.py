"""IP-Adapters of the public layouts: as plain diffusers, with a LoRA below them, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import tiny_adapters
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from hgdpo_core.config import PersonaliserConfig, PoolConfig, SamplerConfig, TargetConfig
from hgdpo_core.errors import ModelError
from hgdpo_core.images import decode_image
from hgdpo_core.models import find_model, load_backbone, load_pipeline
from hgdpo_core.models.files import SD15_CONFIGS
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.models.locations import find_located_model, model_locations
from hgdpo_core.models.personaliser import find_adapter
from hgdpo_core.models.sampling import make_scheduler
from hgdpo_core.prompts import Sample
from hgdpo_core.prompts.concepts import read_concepts
from hgdpo_core.storage import Store

SAMPLER = SamplerConfig(width=32, height=32, steps=3, guidance_scale=3.0)
POOL = PoolConfig(images_per_prompt=1, batch_size=4)
PROMPTS = ["a woman in a red top", "a man in a blue top"]


@pytest.fixture(scope="module")
def folder(target_folder, tmp_path_factory):
    """Adapters of every layout beside their image encoder."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny_adapters.save_encoder(folder / "image_encoder")
    unet = UNet2DConditionModel.from_pretrained(target_folder / "unet")
    for layout in tiny_adapters.LAYOUTS:
        tiny_adapters.save_ip_adapter(folder / f"{layout}.safetensors", unet, layout)
    return folder


@pytest.fixture(scope="module")
def target(target_folder):
    return find_model(TargetConfig(source=str(target_folder), dtype="float32"))


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return read_concepts(tiny_adapters.save_people(tmp_path_factory.mktemp("people"), 3)).concepts


def personal(target, file, **settings):
    config = PersonaliserConfig(source=str(file), crop=None, **settings)
    return replace(target, personaliser=find_adapter(config, target))


def generate(model, samples, people):
    generator = ImageGenerator(model, SAMPLER, POOL, "cpu")
    generator.learn(people)
    return {(str(row["prompt"]), row["concept"]): (row["seed"], np.asarray(decode_image(row["image"])))
            for row in generator.generate(samples)}


@pytest.mark.parametrize("layout", tiny_adapters.LAYOUTS)
def test_images_are_those_of_plain_diffusers(layout, folder, target, people):
    model = personal(target, folder / f"{layout}.safetensors", strength=0.8)
    samples = [Sample(prompt, person.id) for prompt in PROMPTS for person in people[:2]]
    ours = generate(model, samples, people)
    plain = load_pipeline(target)
    plain.load_ip_adapter(str(folder), subfolder="", weight_name=f"{layout}.safetensors",
                          image_encoder_folder="image_encoder")
    plain.set_ip_adapter_scale(0.8)
    plain.scheduler = make_scheduler(plain.scheduler.config)
    for sample in samples:
        seed, pixels = ours[str(sample), sample.concept]
        (person,) = (each for each in people if each.id == sample.concept)
        image = plain(str(sample), ip_adapter_image=person.pictures()[0], width=32, height=32, num_inference_steps=3,
                      guidance_scale=3.0, generator=torch.Generator().manual_seed(seed)).images[0]
        assert np.abs(np.asarray(image).astype(int) - pixels).max() <= 1  # batches of another size
    first, second = (ours[PROMPTS[0], person.id][1].astype(int) for person in people[:2])
    assert np.abs(first - second).max() > 5  # another person is another image


def test_strength_and_person_decide_images_and_ids(folder, target, people):
    file, sample = folder / "plus-face.safetensors", Sample(PROMPTS[0], people[0].id)
    off = personal(target, file, strength=0)
    on = personal(target, file)
    assert on.personaliser.strength == 0.6 and on.personaliser.name == "ip_adapter"
    assert len({model.id for model in (target, off, on)}) == 3
    plain, without, with_it = (generate(model, [sample], people)[PROMPTS[0], sample.concept][1]
                               for model in (target, off, on))
    assert (plain == without).all() and (without != with_it).any()


def test_several_images_of_a_person(folder, target, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            tiny_adapters.picture(10 * number + ord(name)).save(tmp_path / name / f"{number}.png")
    people = read_concepts(tmp_path).concepts
    samples = [Sample(PROMPTS[0], person.id) for person in people]
    images = generate(personal(target, folder / "plain.safetensors"), samples, people)
    assert len(images) == 2


@pytest.mark.parametrize("layout", tiny_adapters.LAYOUTS)
def test_a_lora_lands_on_its_own_layers_and_nowhere_else(layout, folder, target, target_folder, people,
                                                         tmp_path_factory):
    lora = tiny.save_random_lora(tmp_path_factory.mktemp("lora"), target_folder)
    without = personal(target, folder / f"{layout}.safetensors")
    networks = [load_backbone(model).denoiser.network.state_dict() for model in (
        target, target.with_lora(lora, 1.0), without, without.with_lora(lora, 1.0), without.with_lora(lora, 0.5))]
    bare, bare_lora, adapted, adapted_lora, half = networks
    layers = {name for name in bare if not torch.equal(bare[name], bare_lora[name])}
    pairs = sum(name.endswith("lora_A.weight") for name in load_file(lora / "pytorch_lora_weights.safetensors"))
    assert len(layers) == pairs == len(bare_lora.keys() & layers)
    assert {name for name in adapted if not torch.equal(adapted[name], adapted_lora[name])} == layers
    assert adapted.keys() > bare.keys() and not any("lora" in name for name in adapted_lora)
    assert all(torch.equal(bare_lora[name], adapted_lora[name]) for name in layers)
    sample = Sample(PROMPTS[0], people[0].id)
    off, weak, full = (generate(model, [sample], people)[PROMPTS[0], sample.concept][1] for model in (
        without, without.with_lora(lora, 0.5), without.with_lora(lora, 1.0)))
    assert (off != weak).any() and (weak != full).any() and (off != full).any()
    assert not torch.equal(half[min(layers)], adapted_lora[min(layers)])


def test_a_prompt_without_a_concept_is_refused(folder, target, people):
    model = personal(target, folder / "plain.safetensors")
    with pytest.raises(ModelError, match="with no concept: expected a sample"):
        generate(model, PROMPTS, people)
    with pytest.raises(ModelError, match="unknown concept 0000"):
        generate(model, [Sample("a man", "0000")], people)


def sd15_unet():
    """The architecture alone."""
    with init_empty_weights():
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SD15_CONFIGS / "unet"))


@pytest.mark.parametrize("layout", tiny_adapters.LAYOUTS)
def test_the_public_files_of_sd15_fit_it(layout, tmp_path, target):
    """The exact shapes: 768 wide text, ViT-H/14 with 1280 wide tokens and a 1024 wide embedding; only headers count."""
    unet = sd15_unet()
    file = tiny_adapters.save_ip_adapter(tmp_path / "adapter.safetensors", unet, layout, embedding=1024, tokens=1280,
                                         dtype=torch.float16, scale=0)
    assert len(tiny_adapters.attention_shapes(unet)) == 32
    tiny_adapters.save_encoder(tmp_path / "image_encoder", hidden_size=1280, num_attention_heads=16,
                               num_hidden_layers=1, projection_dim=1024)
    sd15 = replace(target, configs=SD15_CONFIGS)
    assert find_adapter(PersonaliserConfig(source=str(file)), sd15).name == "ip_adapter"
    with pytest.raises(ModelError, match="an IP-Adapter 768 wide, the target's text embeddings are 32 wide"):
        find_adapter(PersonaliserConfig(source=str(file)), target)


def change(folder, source, edit):
    """The plus-face adapter, edited, beside the same image encoder."""
    (folder / "image_encoder").symlink_to(source / "image_encoder")
    state = load_file(source / "plus-face.safetensors")
    edit(state)
    save_file(state, folder / "changed.safetensors")
    return PersonaliserConfig(source=str(folder / "changed.safetensors"))


def sdxl(state):
    for name in list(state):
        if "_ip." in name:
            state[name] = torch.zeros(len(state[name]), 2048)


@pytest.mark.parametrize(("edit", "message"), [
    (sdxl, "is an IP-Adapter of SDXL, the target's text embeddings are 32 wide: use one for SD 1.5"),
    (lambda state: state.pop("ip_adapter.1.to_k_ip.weight"), "lacks IP-Adapter's ip_adapter.1.to_k_ip.weight"),
    (lambda state: state.update({"ip_adapter.1.to_k_lora.down.weight": torch.zeros(1)}), "an IP-Adapter FaceID"),
    (lambda state: state.pop("image_proj.latents"), "an image projection of an unknown layout"),
    (lambda state: state.update({"image_proj.proj_in.weight": torch.zeros(32, 99)}), "are 48 wide, changed.* reads 99"),
    (lambda state: [state.pop(name) for name in list(state) if "_ip." in name], "an IP-Adapter without keys wide"),
])
def test_other_adapters_are_refused_before_anything_loads(edit, message, folder, target, tmp_path):
    with pytest.raises(ModelError, match=message) as error:
        find_adapter(change(tmp_path, folder, edit), target)
    assert "\n" not in str(error.value)


def test_missing_files_are_refused(folder, target, tmp_path):
    for source, message in ((tmp_path / "none", "does not exist"), (tmp_path, "is no personaliser")):
        with pytest.raises(ModelError, match=message):
            find_adapter(PersonaliserConfig(source=str(source)), target)
    (tmp_path / "plain.safetensors").symlink_to(folder / "plain.safetensors")
    alone = PersonaliserConfig(source=str(tmp_path / "plain.safetensors"))
    with pytest.raises(ModelError, match="needs the CLIP image encoder"):
        find_adapter(alone, target)
    with pytest.raises(ModelError, match="is no folder: expected config.json"):
        find_adapter(alone.model_copy(update={"image_encoder": "elsewhere"}), target)


def test_a_hub_id_is_found_in_the_cache_without_a_network(folder, target, people, tmp_path, monkeypatch):
    """As the hub's cache is laid out: names in a snapshot are links to files that are called by their hashes."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--h94--IP-Adapter", "a" * 40
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    names = {f"models/{layout}.safetensors": folder / f"{layout}.safetensors" for layout in tiny_adapters.LAYOUTS}
    names |= {f"models/image_encoder/{path.name}": path for path in (folder / "image_encoder").iterdir()}
    for number, (name, path) in enumerate(names.items()):
        blob, link = repository / "blobs" / f"{number:064x}", repository / "snapshots" / commit / name
        blob.write_bytes(path.read_bytes())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    model = personal(target, "h94/IP-Adapter", weight_name="plain.safetensors")
    local = personal(target, folder / "plain.safetensors")
    assert model.identity() == local.identity() and str(model.personaliser.path).startswith(str(repository))
    sample = Sample(PROMPTS[0], people[0].id)
    (_, ours), (_, theirs) = (generate(each, [sample], people).popitem()[1] for each in (model, local))
    assert (ours == theirs).all()
    for copy in (False, True):
        recipe = model_locations(Store(str(tmp_path / "root")), model, copy_to_store=copy)
        found = find_located_model(Store(str(tmp_path / "root")), model.identity(), json.loads(json.dumps(recipe)))
        assert found.identity() == model.identity()
    for settings, message in (({}, "h94/IP-Adapter has no models/ip-adapter-plus-face_sd15.safetensors: set"),
                              ({"subfolder": "", "weight_name": "x.safetensors"}, "has no x.safetensors: set"),
                              ({"source": "h94/Other"}, "h94/Other is not a local folder and could not be downloaded"),
                              ({"revision": "b" * 40}, "could not be downloaded from the hub")):
        with pytest.raises(ModelError, match=message) as error:
            find_adapter(PersonaliserConfig(**{"source": "h94/IP-Adapter", **settings}), target)
        assert "\n" not in str(error.value)
    assert model.personaliser.config.identity("run") != local.personaliser.config.identity("run")


def test_broken_weights_are_refused_when_they_load(folder, target, tmp_path):
    def edit(state):
        state["image_proj.latents"][0, 0, 0] = float("nan")

    with pytest.raises(ModelError, match="holds NaN or infinity in adapter's image_proj.latents"):
        load_backbone(replace(target, personaliser=find_adapter(change(tmp_path, folder, edit), target)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", tiny_adapters.LAYOUTS)
def test_full_size_images_are_those_of_plain_diffusers(layout, tmp_path, people):
    """SD 1.5's own UNet with random weights, and an adapter of the public shapes: one small image, two steps."""
    target = find_model(TargetConfig(source=str(tiny.save_wide_target(tmp_path / "target")), dtype="float32"))
    tiny_adapters.save_ip_adapter(tmp_path / "adapter.safetensors", sd15_unet(), layout, embedding=1024, tokens=1280,
                                  scale=0.1)
    tiny_adapters.save_encoder(tmp_path / "image_encoder", hidden_size=1280, num_attention_heads=16,
                               projection_dim=1024)
    sample = Sample(PROMPTS[0], people[0].id)
    ours = generate(personal(target, tmp_path / "adapter.safetensors", strength=1.0), [sample], people)
    (seed, pixels), = ours.values()
    plain = load_pipeline(target)
    bare = np.asarray(plain_image(plain, seed))
    plain.load_ip_adapter(str(tmp_path), subfolder="", weight_name="adapter.safetensors",
                          image_encoder_folder="image_encoder")
    image = np.asarray(plain_image(plain, seed, ip_adapter_image=people[0].pictures()[0]))
    assert np.abs(image.astype(int) - pixels).max() <= 1
    assert np.abs(image.astype(int) - bare).max() > 1  # the adapter does something


def plain_image(pipeline, seed, **adapter):
    pipeline.scheduler = make_scheduler(pipeline.scheduler.config)
    return pipeline(PROMPTS[0], width=32, height=32, num_inference_steps=3, guidance_scale=3.0,
                    generator=torch.Generator().manual_seed(seed), **adapter).images[0]
