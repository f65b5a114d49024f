"""The user's image folder: captions found, unusable files skipped with the reason, finished work found."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hgdpo_core.config import SftConfig, TargetConfig
from hgdpo_core.errors import InputError
from hgdpo_core.image_sets import read_image_set
from hgdpo_core.image_sets import sets as image_sets
from hgdpo_core.images import decode_image, fit_image, to_model_range
from hgdpo_core.models import find_model, load_backbone
from hgdpo_core.stages import image_latents as sft_images
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.image_latents import ImageLatentStage, find_skipped, image_latent_folder
from hgdpo_core.storage import Store
from hgdpo_core.training.data import LatentImages
from hgdpo_core.training.tune import tune


@pytest.fixture
def folder(tmp_path):
    location = tmp_path / "images"
    location.mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate([(32, 32), (64, 40), (31, 50), (8, 8)]):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(location / f"{i}.png")
    (location / "4.jpg").write_bytes(b"not an image")
    Image.new("L", (40, 40), 128).save(location / "5.png")
    lines = [json.dumps({"file_name": f"{i}.{'jpg' if i == 4 else 'png'}", "text": f"caption {i}"}) for i in range(5)]
    (location / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (location / "5.txt").write_text("a grey one\n")
    return location


@pytest.fixture
def model(target_folder):
    return find_model(TargetConfig(source=str(target_folder), dtype="float32"))


def test_good_images_are_encoded_and_bad_ones_skipped(folder, tmp_path, model):
    store, images = Store(str(tmp_path / "root")), read_image_set(str(folder))
    assert images.index["caption"][5].as_py() == "a grey one"
    latents = image_latent_folder(store, images, model, (32, 32))
    assert ImageLatentStage(images, latents, model).make(Worker("cpu")) == 6
    assert ImageLatentStage(images, latents, model).make(Worker("cpu")) == 0
    assert latents.read(0)["caption"].to_pylist() == ["caption 0", "caption 1", "caption 2", "a grey one"]
    data = store.read_bytes(f"{latents.key}/rejected/shard-00000.parquet")
    reasons = {row["file_name"]: row["reason"] for row in pq.read_table(pa.BufferReader(data)).to_pylist()}
    assert "8x8 pixels, under half of 32x32" in reasons["3.png"]
    assert "do not decode as an image" in reasons["4.jpg"]
    aside = find_skipped(latents, len(images))
    assert {row["file_name"]: row["reason"] for row in aside.reasons} == reasons
    assert aside.describe() == ("skipped, not trained on: 2 of 6 images (under half of the requested size: 1; no image "
                                "that can be decoded: 1)")
    assert len(find_skipped(latents, len(images), show=1).reasons) == 1


def test_captions_that_are_missing_empty_or_endless_are_counted(folder, tmp_path, model):
    for name in ("3.png", "4.jpg"):
        (folder / name).unlink()
    lines = [{"file_name": "0.png", "text": "a woman " * 1250}, {"file_name": "1.png", "text": " "},
             {"file_name": "2.png", "text": "a woman"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "5.txt").write_text("a man")
    store, images = Store(str(tmp_path / "root")), read_image_set(str(folder))
    latents = image_latent_folder(store, images, model, (32, 32))
    ImageLatentStage(images, latents, model).make(Worker("cpu"))
    rows = latents.read(0)
    assert rows["file_name"].to_pylist() == ["0.png", "2.png", "5.png"] and len(rows["caption"][0].as_py()) == 10_000
    aside = find_skipped(latents, len(images))
    assert "`hgdpo caption --images FOLDER` writes them" in aside.reasons[0]["reason"]
    assert aside.describe() == ("skipped, not trained on: 1 of 4 images (it has no caption: 1); captions cut at the "
                                "length that the text encoder reads: 1")


def test_more_images_than_a_batch_and_a_shard_keep_their_order(folder, tmp_path, model, monkeypatch):
    monkeypatch.setattr(image_sets, "IMAGES_PER_SHARD", 3)
    monkeypatch.setattr(sft_images, "ENCODE_BATCH", 2)
    store, images = Store(str(tmp_path / "root")), read_image_set(str(folder))
    latents = image_latent_folder(store, images, model, (32, 32))
    assert ImageLatentStage(images, latents, model).make(Worker("cpu")) == 6
    assert [latents.read(i)["file_name"].to_pylist() for i in (0, 1)] == [["0.png", "1.png", "2.png"], ["5.png"]]
    for number, name in enumerate(["0.png", "1.png", "2.png"]):
        alone = load_backbone(model, "cpu", codec_dtype="float32").codec.encode(torch.from_numpy(to_model_range(
            fit_image(decode_image((folder / name).read_bytes()), 32, 32)))[None])
        kept = np.frombuffer(latents.read(0)["latents"][number].as_py(), np.float32)
        np.testing.assert_allclose(kept, alone.numpy().ravel(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["tars", "parquet"])
def test_what_images_are_kept_in_changes_no_latent(folder, tmp_path, model, kind):
    store, images = Store(str(tmp_path / "root")), read_image_set(str(folder))
    (tmp_path / "other").mkdir()
    names, captions = images.index["name"].to_pylist(), images.index["caption"].to_pylist()
    if kind == "tars":
        with tarfile.open(tmp_path / "other" / "a.tar", "w") as tar:
            for name, caption in zip(names, captions, strict=True):
                tar.add(folder / name, name)
                info = tarfile.TarInfo(f"{name[0]}.txt")
                info.size = len(caption)
                tar.addfile(info, io.BytesIO(caption.encode()))
    else:
        table = pa.table({"image": [(folder / name).read_bytes() for name in names], "text": captions})
        pq.write_table(table, tmp_path / "other" / "a.parquet")
    tables = []
    for location in (folder, tmp_path / "other"):
        images = read_image_set(str(location))
        latents = image_latent_folder(store, images, model, (32, 32))
        ImageLatentStage(images, latents, model).make(Worker("cpu"))
        tables.append(latents.read(0))
        assert find_skipped(latents, len(images)).rejected == 2
    assert tables[0].drop("file_name") == tables[1].drop("file_name") and tables[0].num_rows == 4


def test_sft_makes_a_target_that_plain_diffusers_opens(folder, tmp_path, model):
    from diffusers import StableDiffusionPipeline

    store, images = Store(str(tmp_path / "root")), read_image_set(str(folder))
    latents = image_latent_folder(store, images, model, (32, 32))
    ImageLatentStage(images, latents, model).make(Worker("cpu"))
    assert len(LatentImages(latents, [0])) == 4
    config = SftConfig(max_steps=2, batch_size=2, learning_rate=1e-3, mixed_precision="no")
    tuned = tune("sft", model, latents, [*latents.manifests()], config)
    target = tuned.as_target(model)
    assert target.fingerprint != model.fingerprint
    StableDiffusionPipeline.from_pretrained(tuned.path)
    assert tune("sft", model, latents, [*latents.manifests()], config).existing


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda f: (f / "metadata.jsonl").unlink(), "5 of 6 images have no caption"),
    (lambda f: (f / "metadata.jsonl").write_text("{"), "line 1 of .*metadata.jsonl is not"),
    (lambda f: [p.unlink() for p in f.iterdir()], "holds no image"),
])
def test_unusable_folders_are_one_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        read_image_set(str(folder))


def test_a_folder_without_one_usable_image_is_refused(tmp_path, model):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no")
    (tmp_path / "images" / "a.txt").write_text("caption")
    store, images = Store(str(tmp_path / "root")), read_image_set(str(tmp_path / "images"))
    stage = ImageLatentStage(images, image_latent_folder(store, images, model, (32, 32)), model)
    stage.refuse_if_empty()  # nothing is known before it is made
    assert stage.make(Worker("cpu")) == 1
    with pytest.raises(InputError, match="none of the 1 images can be used"):
        stage.refuse_if_empty()
