"""Cached latents: both orientations where they are requested, and a memory that does not grow with the data set."""

import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import AutoencoderKL

from hgdpo_core.config import DpoConfig, SftConfig, TargetConfig
from hgdpo_core.errors import InputError, StorageError
from hgdpo_core.figures.dataset import write_image_folder
from hgdpo_core.image_sets import read_image_set
from hgdpo_core.images import encode_image
from hgdpo_core.models import find_model
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.image_latents import ImageLatentStage, image_latent_folder
from hgdpo_core.stages.latents import MIRRORED, SCHEMA, LatentStage, latent_folder
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.data import CACHED_SHARDS, DataOrder, LatentImages, LatentPairs
from hgdpo_core.training.tune import tune

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (2, 3, 32, 32, 3), dtype=np.uint8)  # winners and losers of three pairs


@pytest.fixture(scope="module")
def model(target_folder):
    return find_model(TargetConfig(source=str(target_folder), dtype="float32"))


@pytest.fixture(scope="module")
def triplets(tmp_path_factory):
    folder = ShardFolder.create(Store(str(tmp_path_factory.mktemp("root"))), "triplets/hand", {"stage": "triplets"})
    rows = [{"prompt_id": str(i), "caption": f"a woman {i}", "jpg_0": encode_image(PIXELS[0, i], "png"),
             "jpg_1": encode_image(PIXELS[1, i], "png")} for i in range(3)]
    folder.commit(0, pa.Table.from_pylist(rows))
    return folder


def vae_latents(model, pixels: np.ndarray) -> torch.Tensor:
    """Plain diffusers, uint8 [B, 32, 32, 3]."""
    vae = AutoencoderKL.from_pretrained(model.path / "vae")
    images = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return vae.encode(images).latent_dist.mean * vae.config.scaling_factor


def test_flips_add_the_latents_of_the_mirrored_images_and_an_id_only_then(triplets, model):
    plain = latent_folder(triplets.store, triplets, model, (32, 32))
    both = latent_folder(triplets.store, triplets, model, (32, 32), flips=True)
    assert plain.key != both.key and "flips" not in plain.config
    for folder in (plain, both):
        assert LatentStage(triplets, folder, model, (0,)).make(Worker("cpu")) == 3
    assert plain.read(0).schema.names == SCHEMA.names and both.read(0).schema.names == [*SCHEMA.names, *MIRRORED]
    without, batch = LatentPairs(plain, [0]).batch(range(3)), LatentPairs(both, [0]).batch(range(3))
    assert without.winner_mirrored is None and without.loser_mirrored is None
    assert torch.equal(batch.winner_latents, without.winner_latents)
    for pixels, straight, mirrored in ((PIXELS[0], batch.winner_latents, batch.winner_mirrored),
                                       (PIXELS[1], batch.loser_latents, batch.loser_mirrored)):
        torch.testing.assert_close(straight, vae_latents(model, pixels), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mirrored, vae_latents(model, pixels[:, :, ::-1]), rtol=1e-4, atol=1e-5)
        assert (mirrored - straight.flip(-1)).abs().max() > 1e-2  # a mirrored latent would be another one

    config = DpoConfig(max_steps=1, batch_size=2, learning_rate=1e-2, mixed_precision="no", flip=True,
                       allow_foreign_triplets=True)
    with pytest.raises(InputError, match="cache them with flips"):
        tune("dpo", model, plain, [0], config, triplets.key)
    assert tune("dpo", model, both, [0], config, triplets.key).log[-1]["step"] == 1


def test_latents_of_a_rounded_vae_are_not_found_again_and_float32_ids_stay(triplets, tmp_path, model):
    """Before, a VAE's weights were rounded to the target's precision; float32 rows are what they were."""
    write_image_folder(tmp_path / "images", 2, seed=0)
    images = read_image_set(str(tmp_path / "images"))
    for dtype, version in (("float32", None), ("bfloat16", 2), ("float16", 2)):
        target = replace(model, dtype=dtype)
        for folder in (latent_folder(triplets.store, triplets, target, (32, 32)),
                       image_latent_folder(triplets.store, images, target, (32, 32))):
            assert folder.config.get("vae_version") == version


def test_the_same_for_images(tmp_path, model):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encode_image(PIXELS[0, 0], "png"))
    (tmp_path / "images" / "a.txt").write_text("a woman")
    store, images = Store(str(tmp_path / "root")), read_image_set(str(tmp_path / "images"))
    plain = image_latent_folder(store, images, model, (32, 32))
    both = image_latent_folder(store, images, model, (32, 32), flips=True)
    assert plain.key != both.key and "flips" not in plain.config
    ImageLatentStage(images, both, model).make(Worker("cpu"))
    batch = LatentImages(both, [0]).batch([0])
    torch.testing.assert_close(batch.latents, vae_latents(model, PIXELS[0, :1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.mirrored, vae_latents(model, PIXELS[0, :1, :, ::-1]), rtol=1e-4, atol=1e-5)
    config = SftConfig(max_steps=1, batch_size=1, learning_rate=1e-4, mixed_precision="no", flip=True)
    assert tune("sft", model, both, [0], config).log[-1]["step"] == 1


class Counted(ShardFolder):
    """Counts how often a shard is fetched."""

    fetched = 0

    def read(self, *args, **settings):
        self.fetched += 1
        return super().read(*args, **settings)


def many_shards(tmp_path, shards, kind=ShardFolder):
    """A folder of pairs, three in each shard, whose winners hold the number of their row."""
    folder = kind.create(Store(str(tmp_path)), "latents/many/hand", {"stage": "latents"})
    for index in range(shards):
        rows = [{"prompt_id": f"{index}-{row}", "winner": np.full(4, 3 * index + row, np.float32).tobytes(),
                 "loser": np.zeros(4, np.float32).tobytes(), "prompt_embeds": np.zeros(6, np.float32).tobytes()}
                for row in range(3)]
        folder.commit(index, pa.Table.from_pylist(rows, schema=SCHEMA),
                      details={"latent_shape": [1, 2, 2], "embeds_shape": [2, 3]})
    return folder


@pytest.mark.parametrize("shards", [5, 40])
def test_memory_holds_a_fixed_number_of_shards_and_fetches_each_once_an_epoch(tmp_path, shards):
    folder = many_shards(tmp_path, shards, Counted)
    pairs = LatentPairs(folder, range(shards))
    seen, held = [], 0
    for epoch in (0, 1):
        order = pairs.order(seed=0, epoch=epoch)
        assert sorted(order) == list(range(3 * shards))
        for start in range(0, len(order), 4):
            batch = pairs.batch(order[start:start + 4])
            seen.append(batch.winner_latents[:, 0, 0, 0])
            held = max(held, len(pairs.tables))
    assert held == min(shards, 2 * CACHED_SHARDS)
    assert torch.cat(seen).long().bincount().tolist() == [2] * 3 * shards
    assert folder.fetched <= (shards if shards <= CACHED_SHARDS else 2 * shards)


class Watched(ShardFolder):
    """Keeps what was read, and can be made to wait."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read_shards: list[int] = []
        self.tables: list[weakref.ref] = []
        self.gate = threading.Event()
        self.gate.set()

    def read(self, index, *args, **settings):
        assert self.gate.wait(30)
        table = super().read(index, *args, **settings)
        self.read_shards.append(index)
        self.tables.append(weakref.ref(table))
        return table


def test_the_next_groups_shards_are_fetched_while_one_is_trained_on(tmp_path):
    shards = 3 * CACHED_SHARDS
    folder = many_shards(tmp_path, shards, Watched)
    pairs = LatentPairs(folder, range(shards))
    order, most = pairs.order(seed=0, epoch=0), 0
    groups = [set(np.array(order[start:start + 3 * CACHED_SHARDS]) // 3)
              for start in range(0, len(order), 3 * CACHED_SHARDS)]
    for start in range(0, len(order), 4):
        group = start // (3 * CACHED_SHARDS)
        batch = pairs.batch(order[start:start + 4])
        assert batch.winner_latents[:, 0, 0, 0].long().tolist() == order[start:start + 4]
        if start % (3 * CACHED_SHARDS) == 8:  # the batches of a group wait for no fetch but its own first one
            wait_for(lambda group=group: set(folder.read_shards) >= set().union(*groups[:group + 2]))
            folder.gate.clear()
        elif start % (3 * CACHED_SHARDS) == 44:
            folder.gate.set()
        most = max(most, len(pairs.tables))
        assert sum(table() is not None for table in folder.tables) <= 2 * CACHED_SHARDS
    assert most == 2 * CACHED_SHARDS
    assert sorted(folder.read_shards) == list(range(shards))  # each once


def wait_for(condition):
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_a_batch_fetches_its_shards_at_once(tmp_path, monkeypatch):
    folder = many_shards(tmp_path, 4)
    together, read = threading.Barrier(4), ShardFolder.read

    def reading(self, *arguments, **options):
        together.wait(30)  # one after the other, the first would wait in vain
        return read(self, *arguments, **options)

    monkeypatch.setattr(ShardFolder, "read", reading)
    batch = LatentPairs(folder, range(4)).batch([0, 3, 6, 9])
    assert batch.winner_latents[:, 0, 0, 0].long().tolist() == [0, 3, 6, 9]


def test_batches_are_the_same_where_two_epochs_meet_and_in_any_order(tmp_path):
    shards = 3 * CACHED_SHARDS
    pairs = LatentPairs(many_shards(tmp_path, shards), range(shards))
    plan = DataOrder(pairs, seed=1)
    for start in range(0, 7 * len(pairs) // 2, 5):
        rows = plan.indices(range(start, start + 5))
        assert pairs.batch(rows).winner_latents[:, 0, 0, 0].long().tolist() == rows
        assert len(pairs.tables) <= 2 * CACHED_SHARDS
    rows = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    assert pairs.batch(rows).winner_latents[:, 0, 0, 0].long().tolist() == rows
    assert len(pairs.tables) <= 2 * CACHED_SHARDS


def test_a_shard_that_could_not_be_fetched_fails_where_it_is_used_and_is_fetched_again(tmp_path, monkeypatch):
    pairs = LatentPairs(many_shards(tmp_path, 2), range(2))
    with monkeypatch.context() as broken:
        broken.setattr(ShardFolder, "read", lambda *_, **__: (_ for _ in ()).throw(StorageError("no network")))
        with pytest.raises(StorageError, match="no network"):
            pairs.batch([0])
    assert pairs.batch([0]).winner_latents[0, 0, 0, 0] == 0
