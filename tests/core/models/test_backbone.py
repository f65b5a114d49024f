"""The seam: a family registered from outside generates images, and conditionings carry whatever a family reads."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from hgdpo_core.config import PoolConfig, SamplerConfig, TargetConfig
from hgdpo_core.errors import ModelError
from hgdpo_core.models import FAMILIES, Conditioning, find_model, load_backbone
from hgdpo_core.models.backbone import find_family
from hgdpo_core.models.files import read_config
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.models.sd15 import UnetDenoiser, make_backbone

PROMPTS = ["a woman in a red top", "a man in a blue top"]
SAMPLER = SamplerConfig(width=32, height=32, steps=2, guidance_scale=2.0)


class Other:
    """A family whose folders say OtherPipeline; its networks are those of SD 1.5, so that images can be compared."""

    def __init__(self):
        self.seen = []

    def recognises(self, path):
        index = path / "model_index.json"
        return index.is_file() and read_config(index)["_class_name"] == "OtherPipeline"

    def check_folder(self, path, *, own_vae):
        if not (path / "unet").is_dir():
            raise ModelError(f"{path} has no network")

    def load(self, model, device, *, dtype, codec_dtype):
        pipeline = StableDiffusionPipeline.from_pretrained(model.path, safety_checker=None, local_files_only=True)
        backbone = make_backbone(pipeline, model)
        self.seen.append((device, dtype, codec_dtype))
        return backbone


@pytest.fixture
def other(target_folder, tmp_path):
    """The tiny target's folder as one of the other family's."""
    folder = tmp_path / "other"
    shutil.copytree(target_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "OtherPipeline"}))
    return TargetConfig(source=str(folder), dtype="float32")


def test_a_family_from_outside_is_found_by_its_files_and_generates(other, target_folder, monkeypatch):
    with pytest.raises(ModelError, match="holds a OtherPipeline: expected a StableDiffusionPipeline"):
        find_model(other)
    monkeypatch.setitem(FAMILIES, "other", family := Other())
    model, plain = find_model(other), find_model(TargetConfig(source=str(target_folder), dtype="float32"))
    assert find_family(model.path) is family and find_family(plain.path) is FAMILIES["sd15"]
    images = [[row["image"] for row in ImageGenerator(each, SAMPLER, PoolConfig(images_per_prompt=2), "cpu").generate(
        PROMPTS)] for each in (model, plain)]
    assert images[0] == images[1] and len(images[0]) == 4
    assert family.seen == [("cpu", None, None)]
    shutil.rmtree(model.path / "unet")
    with pytest.raises(ModelError, match="has no network"):
        find_model(other)


def test_a_backbone_gives_its_shapes_and_encodes_what_it_decodes(target_folder):
    backbone = load_backbone(find_model(TargetConfig(source=str(target_folder), dtype="float32")))
    assert backbone.latent_shape((32, 64)) == (4, 8, 4)
    assert backbone.shapes((32, 64)) == {"latent_shape": [4, 8, 4], "embeds_shape": [24, 32]}
    latents = backbone.codec.encode(torch.zeros(2, 3, 64, 32))
    assert latents.shape == (2, 4, 8, 4) and backbone.codec.decode(latents).pixels.shape == (2, 64, 32, 3)
    captions = backbone.text.encode_captions(PROMPTS)
    assert torch.equal(captions.embeds[0], backbone.text.encode(PROMPTS)[0].embeds[0])
    assert backbone.text.count_cut(["a man", "a man " * 40]) == 1
    assert isinstance(backbone.denoiser, UnetDenoiser)
    noisy = torch.zeros(2, 4, 8, 4)
    assert np.isfinite(backbone.denoiser(noisy, torch.tensor([0, 999]), captions).detach().numpy()).all()


def test_a_conditioning_changes_as_a_whole():
    def conditioning(value, count=2):
        return Conditioning(torch.full((count, 3, 4), value), torch.ones(count, 3, dtype=torch.bool),
                            torch.full((count, 5), value), {"sizes": torch.full((count, 6), value)})

    def tensors(one):
        return [one.embeds, one.mask, one.pooled, one.extra["sizes"]]

    both = Conditioning.join([conditioning(1.0), conditioning(2.0, 1)])
    assert len(both) == 3 and both.length == 3
    assert [tensor.flatten(1)[:, 0].tolist() for tensor in tensors(both)] == [[1, 1, 2], [True] * 3, *[[1, 1, 2]] * 2]
    assert all(len(tensor) == 4 for tensor in tensors(conditioning(1.0).repeat(2)))
    assert all(len(tensor) == 7 for tensor in tensors(conditioning(1.0, 1).expand(7)))
    mixed = conditioning(1.0).replaced(torch.tensor([False, True]), conditioning(0.0, 1))
    assert [tensor.flatten(1)[:, 0].tolist() for tensor in (mixed.embeds, mixed.pooled, mixed.extra["sizes"])] == [
        [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]  # a text is replaced, the image and its size stay
    half = conditioning(1.0).to("cpu", torch.bfloat16)
    assert [tensor.dtype for tensor in tensors(half)] == [torch.bfloat16, torch.bool, torch.bfloat16, torch.bfloat16]
    assert Conditioning(torch.zeros(1, 2, 3)).repeat(2).pooled is None
