"""Triplets: exact round trip, readable by other trainers, nothing dropped silently, latents as METHOD says."""

import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import DatasetCard
from PIL import Image

from hgdpo_core.config import DpoConfig, PoolConfig, SamplerConfig, TargetConfig, TripletConfig
from hgdpo_core.errors import ConfigError, InputError, StoppedError, StorageError
from hgdpo_core.images import decode_image
from hgdpo_core.models import find_model
from hgdpo_core.prompts import image_seed, prompt_id
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.dataset_card import card_licence, render_card
from hgdpo_core.stages.latents import LatentStage, latent_folder
from hgdpo_core.stages.pool import plan_pool
from hgdpo_core.stages.scores import SCHEMA as SCORE_SCHEMA
from hgdpo_core.stages.triplets import REJECTED_SCHEMA, SCHEMA, TripletStage, triplet_folder
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.data import LatentPairs
from hgdpo_core.training.tune import tune

PROMPTS = [f"a woman in a red top, number {i}" for i in range(5)]
SAMPLER = SamplerConfig(width=32, height=32, steps=1, guidance_scale=1.0)
POOL = PoolConfig(images_per_prompt=4, prompts_per_shard=2, batch_size=8)


@pytest.fixture(scope="module")
def world(tmp_path_factory, target_folder):
    """A drawn pool with hand-written scores: prompt 1 ties everywhere, prompt 3 has a score that is not finite."""
    store = Store(str(tmp_path_factory.mktemp("root")))
    model = find_model(TargetConfig(source=str(target_folder), dtype="float32"))
    plan = plan_pool(store, model, SAMPLER, POOL, PROMPTS)
    plan.make(Worker("cpu"))
    scores = ShardFolder.create(store, f"scores/{plan.pool_id}/hand", {"stage": "score", "fingerprint": "by hand"})
    by_prompt = {0: [1, 4, 2, 3], 1: [5, 5, 5, 5], 2: [9, 1, 9, 1], 3: [1, float("nan"), 2, 3], 4: [4, 3, 2, 1]}
    for shard in plan.shards:
        rows = [{"prompt_id": prompt_id(p), "index": j, "score": float(by_prompt[PROMPTS.index(p)][j])}
                for p in shard.prompts for j in range(4)]
        scores.commit(shard.index, pa.Table.from_pylist(rows, schema=SCORE_SCHEMA),
                      inputs=(plan.folder.input_shard(shard.index),))
    return store, model, plan, scores


def stage_of(world, folder, config, prompts=PROMPTS):
    _, _, plan, scores = world
    return TripletStage(plan.folder, scores, folder, frozenset(map(prompt_id, prompts)), config, tuple(plan.indices))


def build(world, config=TripletConfig(), prompts=PROMPTS):  # noqa: B008 - frozen
    store, _, plan, scores = world
    folder = triplet_folder(store, plan.folder, scores, f"{len(prompts)}-test", config)
    stage = stage_of(world, folder, config, prompts)
    stage.make(Worker("cpu"))
    counts = stage.counts()
    rows = {row["caption"]: row for index in plan.indices for row in folder.read(index).to_pylist()}
    return folder, counts, rows


def dataset_card(folder, indices, counts, licence="unknown") -> str:
    manifests = folder.manifests(indices)
    return render_card(folder, [manifests[index] for index in indices], rows=counts.triplets, rejected=counts.rejected,
                       licence=licence, schema=SCHEMA)


def test_best_and_worst_with_their_bytes_seeds_and_scores(world):
    _, _, plan, _ = world
    _, counts, rows = build(world)
    assert (counts.triplets, counts.rejected) == (3, 2)
    assert {p: (r["winner_index"], r["loser_index"]) for p, r in rows.items()} == {
        PROMPTS[0]: (1, 0), PROMPTS[2]: (0, 1), PROMPTS[4]: (0, 3)}
    stored = {(r["prompt"], r["index"]): r["image"] for i in plan.indices for r in plan.folder.read(i).to_pylist()}
    row = rows[PROMPTS[0]]
    assert row["jpg_0"] == stored[PROMPTS[0], 1] and row["jpg_1"] == stored[PROMPTS[0], 0]
    assert (row["label_0"], row["label_1"], row["has_label"], row["are_different"]) == (1.0, 0.0, True, True)
    assert (row["winner_score"], row["loser_score"]) == (4.0, 1.0)
    assert row["loser_seed"] == image_seed(0, PROMPTS[0], 0)
    assert row["best_image_uid"] == row["image_0_uid"] != row["image_1_uid"]


def test_pools_without_a_pair_are_kept_with_their_reason(world):
    folder, _, _ = build(world)
    rejected = {}
    for name in folder.rejected():
        rows = folder.store.read_bytes(f"{folder.key}/rejected/{name}.parquet")
        import pyarrow.parquet as pq
        for row in pq.read_table(pa.BufferReader(rows)).cast(REJECTED_SCHEMA).to_pylist():
            rejected[row["prompt"]] = row["reason"]
    assert rejected == {PROMPTS[1]: "winner and loser score the same", PROMPTS[3]: "a score is not finite"}


def test_stopping_is_said_and_keeps_what_is_finished(world):
    store, _, plan, scores = world
    config = TripletConfig(loser_rank=3)
    folder = triplet_folder(store, plan.folder, scores, "5-stopped", config)
    asked, stage = iter([False, True]), stage_of(world, folder, config)
    with pytest.raises(StoppedError, match="finished shards are kept"):
        stage.make(Worker("cpu", should_stop=lambda: next(asked)))
    assert list(folder.manifests()) == [0]
    stage.make(Worker("cpu"))
    assert stage.counts().rejected == 2


def test_loser_rank_and_subset_of_prompts(world):
    _, counts, rows = build(world, TripletConfig(loser_rank=2), PROMPTS[:1])
    assert counts.triplets == 1
    assert (rows[PROMPTS[0]]["loser_index"], rows[PROMPTS[0]]["loser_rank"]) == (3, 2)


def test_a_smaller_pool_is_the_first_images_of_the_larger(world):
    """Prompt 0 scores 1, 4, 2, 3; of its first 3 images the lower ranks change, of prompt 2 the tie goes as always."""
    whole, _, _ = build(world)
    folder, counts, rows = build(world, TripletConfig(pool_size=3))
    assert folder.key != whole.key and (counts.triplets, counts.rejected) == (3, 2)
    assert {p: (r["winner_index"], r["loser_index"]) for p, r in rows.items()} == {
        PROMPTS[0]: (1, 0), PROMPTS[2]: (0, 1), PROMPTS[4]: (0, 2)}
    assert {(r["pool_size"], r["loser_rank"]) for r in rows.values()} == {(3, 3)}
    _, _, ranked = build(world, TripletConfig(pool_size=3, loser_rank=2))
    assert ranked[PROMPTS[0]]["loser_index"] == 2


def test_a_pool_size_over_the_pool_is_refused(world):
    with pytest.raises(ConfigError, match="pool_size is 5, but .* holds 4 images per prompt"):
        build(world, TripletConfig(pool_size=5))


@pytest.mark.parametrize(("columns", "expected"), [
    ({"id": ["x"], "score": [0.5]}, r"prompt_id \(string\), index \(int32\), score \(float\), got id \(string\)"),
    ({"prompt_id": ["x"], "index": pa.array([0], pa.int32()), "score": ["good"]}, r"expected score \(float\), got")])
def test_shards_that_something_else_wrote_are_one_line(world, columns, expected):
    """With manifests in order, so that only the columns tell."""
    store, model, plan, _ = world
    foreign = ShardFolder.create(store, f"scores/{plan.pool_id}/{len(columns)}", {"stage": "score", "fingerprint": "x"})
    for shard in plan.shards:
        foreign.commit(shard.index, pa.table(columns), inputs=(plan.folder.input_shard(shard.index),))
    with pytest.raises(StorageError, match=f"does not have the columns of its stage: .*{expected}.*use another root"):
        build((store, model, plan, foreign))


def test_finished_shards_are_found_and_counts_stay(world):
    folder, counts, _ = build(world)
    before = folder.manifests()
    _, again, _ = build(world)
    assert again == counts and folder.manifests() == before


def test_other_trainers_read_exactly_what_the_manifests_name(world, tmp_path):
    store, _, plan, _ = world
    folder, counts, rows = build(world)
    location = store.local_path(folder.key)
    (location / "README.md").write_text(dataset_card(folder, plan.indices, counts))
    (location / "shard-99999-000000000000.parquet").write_bytes(b"left by a killed writer, named by no manifest")
    loaded = datasets.load_dataset(str(location), split="train", cache_dir=str(tmp_path))
    assert loaded.column_names[:6] == ["jpg_0", "jpg_1", "label_0", "label_1", "caption", "best_image_uid"]
    assert {row["caption"]: row["jpg_0"] for row in loaded} == {p: row["jpg_0"] for p, row in rows.items()}
    named = [str(location / manifest.file) for manifest in folder.manifests().values()]
    plain = datasets.load_dataset("parquet", data_files=named, split="train", cache_dir=str(tmp_path))
    assert plain.features == loaded.features and plain[:] == loaded[:]
    shown = datasets.load_dataset(str(location), "images", split="train", cache_dir=str(tmp_path))
    assert {name for name, kind in shown.features.items() if isinstance(kind, datasets.Image)} == {"jpg_0", "jpg_1"}
    assert shown.num_rows == loaded.num_rows and shown.column_names == loaded.column_names
    assert np.array_equal(np.asarray(shown[0]["jpg_0"]), np.asarray(decode_image(loaded[0]["jpg_0"])))


def test_a_public_trainer_sees_winner_and_loser(world, tmp_path):
    """The reading part of diffusers' Diffusion-DPO example: images from bytes, swapped where label_0 is 0."""
    store, _, plan, _ = world
    folder, counts, rows = build(world)
    location = store.local_path(folder.key)
    (location / "README.md").write_text(dataset_card(folder, plan.indices, counts))
    examples = datasets.load_dataset(str(location), split="train", cache_dir=str(tmp_path))[:]
    pairs = [[Image.open(io.BytesIO(data)).convert("RGB") for data in examples[name]] for name in ("jpg_0", "jpg_1")]
    for caption, first, second, label in zip(examples["caption"], *pairs, examples["label_0"], strict=True):
        winner, loser = (first, second) if label else (second, first)
        assert winner.tobytes() == decode_image(rows[caption]["jpg_0"]).tobytes() != loser.tobytes()
        assert loser.tobytes() == decode_image(rows[caption]["jpg_1"]).tobytes()


def test_the_card_counts_shows_scores_and_says_how(world):
    folder, counts, _ = build(world)
    text = dataset_card(folder, world[2].indices, counts, licence="cc-by-4.0")
    card = DatasetCard(text)
    assert card.data.license == "cc-by-4.0" and card.data.size_categories == ["n<1K"]
    assert card.data.configs[0]["data_files"] == [manifest.file for manifest in folder.manifests().values()]
    assert "- triplets: 3\n- files: 3, " in text
    assert "\n- pools without a pair, in `rejected/` with the reason: 2\n" in text
    # winners 4, 9, 4; losers 1, 1, 1
    assert "| winner | 5.667 | 2.357 | 4.000 | 4.000 | 9.000 |" in text
    assert "| winner - loser | 4.667 | 2.357 | 3.000 | 3.000 | 8.000 |" in text
    lines = text.splitlines()
    assert f"1.00 to 1.67  0{' ' * 27}3 {'#' * 24}" in lines        # all losers
    assert f"4.33 to 5.00  0{' ' * 27}0" in lines and f"8.33 to 9.00  1 {'#' * 8}{' ' * 18}0" in lines
    settings = json.loads(text.split("```json")[1].split("```")[0])
    assert settings["scores"]["fingerprint"] == "by hand" and settings["pool"]["images_per_prompt"] == 4
    assert settings["triplets"] == folder.config


def test_a_card_that_is_up_to_date_is_not_made_again(world, monkeypatch):
    store, _, plan, _ = world
    folder, counts, _ = build(world, prompts=PROMPTS[:3])
    card = dataset_card(folder, plan.indices[:2], counts, licence="mit")
    store.write_bytes(f"{folder.key}/README.md", card.encode())
    assert card_licence(store, folder.key) == "mit" and card_licence(store, "triplets/none") == "unknown"
    assert dataset_card(folder, plan.indices[:2], counts, licence="other") != card
    monkeypatch.setattr(ShardFolder, "read_columns", lambda *_, **__: pytest.fail("read the scores again"))
    assert dataset_card(folder, plan.indices[:2], counts, licence="mit") == card


def test_a_data_set_without_a_triplet_has_a_card(world):
    folder, counts, _ = build(world, prompts=[PROMPTS[1]])
    assert counts.triplets == 0
    assert "There is no triplet." in dataset_card(folder, [0], counts)


def test_latents_are_scaled_posterior_means_and_embeddings_the_samplers(world):
    store, model, plan, _ = world
    folder, _, rows = build(world)
    latents = latent_folder(store, folder, model, (32, 32))
    assert LatentStage(folder, latents, model, tuple(plan.indices)).make(Worker("cpu")) == 3
    assert LatentStage(folder, latents, model, tuple(plan.indices)).make(Worker("cpu")) == 0
    pairs = LatentPairs(latents, plan.indices)
    batch = pairs.batch(range(3))
    vae = AutoencoderKL.from_pretrained(model.path / "vae")
    captions = [row["caption"] for index in plan.indices for row in folder.read(index).to_pylist()]
    for position, caption in enumerate(captions):
        image = torch.from_numpy(np.asarray(decode_image(rows[caption]["jpg_0"])).copy()).permute(2, 0, 1)[None]
        with torch.no_grad():
            mean = vae.encode(image / 127.5 - 1).latent_dist.mean[0] * vae.config.scaling_factor
        torch.testing.assert_close(batch.winner_latents[position], mean, rtol=1e-4, atol=1e-5)
    assert batch.prompt_embeds.shape == (3, 24, 32)
    assert sorted(pairs.order(seed=1, epoch=0)) == [0, 1, 2]
    assert pairs.order(seed=1, epoch=0) == pairs.order(seed=1, epoch=0)


def test_foreign_triplets_are_refused_unless_wanted(world, tmp_path):
    import tiny

    store, model, plan, _ = world
    folder, _, _ = build(world)
    stranger = find_model(TargetConfig(source=str(tiny.save_target(tmp_path / "other", seed=1)), dtype="float32"))
    latents = latent_folder(store, folder, stranger, (32, 32))
    LatentStage(folder, latents, stranger, tuple(plan.indices)).make(Worker("cpu"))
    config = DpoConfig(max_steps=1, batch_size=2, learning_rate=1e-4, mixed_precision="no")
    with pytest.raises(InputError, match="train the model that generated the pool"):
        tune("dpo", stranger, latents, plan.indices, config, folder.key)
    expected = config.model_copy(update={"allow_foreign_triplets": True})
    assert tune("dpo", stranger, latents, plan.indices, expected, folder.key).path.is_dir()


def test_a_lora_is_made_once_and_opens_in_plain_diffusers(world):
    from diffusers import StableDiffusionPipeline

    store, model, plan, _ = world
    folder, _, _ = build(world)
    latents = latent_folder(store, folder, model, (32, 32))
    LatentStage(folder, latents, model, tuple(plan.indices)).make(Worker("cpu"))
    config = DpoConfig(max_steps=2, batch_size=2, learning_rate=1e-2, mixed_precision="no")
    made = tune("dpo", model, latents, plan.indices, config, folder.key)
    found = tune("dpo", model, latents, plan.indices, config.model_copy(update={"log_every": 7}), folder.key)
    assert not made.existing and found.existing and found.model_id == made.model_id and found.log == made.log
    pipeline = StableDiffusionPipeline.from_pretrained(model.path)
    pipeline.set_progress_bar_config(disable=True)

    def generate() -> Image.Image:
        return pipeline("a woman", height=32, width=32, num_inference_steps=2,
                        generator=torch.Generator().manual_seed(0)).images[0]

    before = np.asarray(generate()).astype(int)
    pipeline.load_lora_weights(made.path)
    assert np.abs(np.asarray(generate()).astype(int) - before).max() > 0
