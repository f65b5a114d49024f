"""Pools: the same images whatever the shard, batch or list; found again, never made twice; plain diffusers agrees."""

import itertools
import threading

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor

from hgdpo_core.config import PoolConfig, SamplerConfig, TargetConfig
from hgdpo_core.errors import ConfigError, ModelError, StoppedError, StorageError
from hgdpo_core.images import decode_image
from hgdpo_core.models import find_model, image_generator
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.prompts import image_seed
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.pool import PoolPlan, plan_pool
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

SAMPLER = SamplerConfig(width=32, height=48, steps=4, guidance_scale=5.0)
PROMPTS = ["a woman in a red top", "a man in a blue top", "a girl with black hair waves"]
TOLERANCE = 1  # of 255: float32 sums in another order may round a pixel the other way


@pytest.fixture
def model(target_folder):
    return find_model(TargetConfig(source=str(target_folder), dtype="float32", negative_prompt="blurry"))


def draw(root, model, prompts=PROMPTS, **settings):
    """{(prompt, index): pixels} of a pool, and its plan before it was drawn."""
    pool = PoolConfig(**({"images_per_prompt": 3, "prompts_per_shard": 2, "batch_size": 4} | settings))
    store = Store(str(root))
    plan = plan_pool(store, model, SAMPLER, pool, prompts)
    plan.make(Worker("cpu"))
    images = {}
    for index in plan.indices:
        for row in plan.folder.read(index).to_pylist():
            images[row["prompt"], row["index"]] = np.asarray(decode_image(row["image"]))
    return images, plan


def difference(a, b):
    return max(int(np.abs(a[key].astype(int) - b[key].astype(int)).max()) for key in a.keys() & b.keys())


def test_the_same_plan_gives_the_same_bits(tmp_path, model):
    assert difference(draw(tmp_path / "a", model)[0], draw(tmp_path / "b", model)[0]) == 0


def test_batches_side_by_side_give_the_same_bits(tmp_path, model, monkeypatch):
    one, _ = draw(tmp_path / "a", model, batch_size=2)
    monkeypatch.setattr(image_generator, "count_threads", lambda *_: 3)
    several, _ = draw(tmp_path / "b", model, batch_size=2)
    assert difference(one, several) == 0 and one.keys() == several.keys()


@pytest.mark.parametrize(("batch_size", "threads"), [(2, 3), (3, 1), (6, 1)])
def test_a_shard_of_few_batches_gives_each_all_cores(tmp_path, model, monkeypatch, batch_size, threads):
    """Six images a shard: three batches fill three cores, two or one do not."""
    asked = []
    monkeypatch.setattr(image_generator, "count_threads", lambda *_: 3)
    monkeypatch.setattr(image_generator, "parallel_map",
                        lambda jobs, count: asked.append(count) or (job() for job in jobs))
    draw(tmp_path, model, prompts=PROMPTS[:2], batch_size=batch_size)
    assert asked == [threads]


def test_batch_and_shard_sizes_do_not_choose_the_image(tmp_path, model):
    images, _ = draw(tmp_path / "a", model)
    other, _ = draw(tmp_path / "b", model, batch_size=7, prompts_per_shard=1)
    assert images.keys() == other.keys()
    assert difference(images, other) <= TOLERANCE
    assert difference(images, {key: images[PROMPTS[0], 0] for key in images}) > 20  # images do differ


def test_a_larger_pool_contains_the_smaller(tmp_path, model):
    small, _ = draw(tmp_path / "a", model, images_per_prompt=5, prompts=PROMPTS[:1])
    large, _ = draw(tmp_path / "b", model, images_per_prompt=20, prompts=PROMPTS[:1])
    assert len(large) == 20
    assert set(small) < set(large)
    assert difference(small, large) <= TOLERANCE


def test_plain_diffusers_reproduces_an_image_from_its_seed(tmp_path, model):
    images, _ = draw(tmp_path, model)
    pipeline = StableDiffusionPipeline.from_pretrained(model.path)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    seed = image_seed(0, PROMPTS[1], 2)
    image = pipeline(PROMPTS[1], negative_prompt="blurry", width=32, height=48, num_inference_steps=4,
                     guidance_scale=5.0, generator=torch.Generator().manual_seed(seed)).images[0]
    assert np.abs(np.asarray(image).astype(int) - images[PROMPTS[1], 2].astype(int)).max() <= TOLERANCE


def test_half_precision_noise_is_what_plain_diffusers_draws():
    """The seed alone must be enough for plain diffusers, also in bfloat16: it draws in that precision itself."""
    ours = torch.randn((4, 4, 6), generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    theirs = torch.randn((4, 4, 6), generator=torch.Generator().manual_seed(5), dtype=torch.bfloat16)
    assert torch.equal(ours, theirs)


def test_finished_shards_are_found_and_a_longer_list_adds_only_the_rest(tmp_path, model):
    _, first = draw(tmp_path, model, prompts=PROMPTS[:2])
    assert len(first.missing) == 1
    _, again = draw(tmp_path, model, prompts=PROMPTS[:2])
    assert again.missing == () and again.pool_id == first.pool_id
    _, longer = draw(tmp_path, model, prompts=[*PROMPTS, PROMPTS[0]])
    assert longer.pool_id == first.pool_id
    assert [shard.prompts for shard in longer.missing] == [(PROMPTS[2],)]
    assert longer.folder.config["expected"] == {"shards": 2, "rows": 9}


@pytest.mark.parametrize("asked", [PROMPTS, PROMPTS[1:]])
def test_a_lost_plan_makes_no_image_again(tmp_path, model, asked):
    """Its file was deleted, as the message about a damaged one advises: the shards themselves name their prompts."""
    _, plan = draw(tmp_path, model)
    for path in (tmp_path / plan.folder.key / "plan").iterdir():
        path.unlink()
    again = plan_pool(plan.folder.store, model, SAMPLER, plan.pool, asked)
    assert again.shards == plan.shards and again.missing == ()
    worker = PoolPlan.open(plan.folder, plan.recipe(), plan.indices)  # which reads the plan from the store
    assert worker.shards == plan.shards


def test_an_index_planned_twice_keeps_its_shard_and_the_other_prompts_move_on(tmp_path, model):
    draw(tmp_path, model, prompts=PROMPTS[:2])
    plans = next((tmp_path / "pools").glob("*/plan"))
    ours = next(plans.iterdir())
    rival = Store(str(tmp_path / "rival"))
    plan = plan_pool(rival, model, SAMPLER, PoolConfig(images_per_prompt=3, prompts_per_shard=2), PROMPTS[2:])
    theirs = next(rival.local_path(f"{plan.folder.key}/plan").iterdir())
    (plans / "00000-000000000000.parquet").write_bytes(theirs.read_bytes())  # sorts first, so it is believed
    assert ours.name > "00000-000000000000.parquet"
    images, healed = draw(tmp_path, model)
    assert set(images) == {(prompt, index) for prompt in PROMPTS for index in range(3)}
    _, again = draw(tmp_path, model)
    assert again.missing == () and again.indices == healed.indices


def test_what_decides_an_image_decides_the_pool(tmp_path, model):
    store, pool = Store(str(tmp_path)), PoolConfig()
    base = plan_pool(store, model, SAMPLER, pool, PROMPTS).pool_id
    assert plan_pool(store, model, SAMPLER, pool.model_copy(update={"batch_size": 3}), PROMPTS).pool_id == base
    for name, value in {"seed": 1, "images_per_prompt": 5, "image_format": "webp", "prompts_per_shard": 4}.items():
        other = pool.model_copy(update={name: value})
        assert plan_pool(store, model, SAMPLER, other, PROMPTS).pool_id != base, name
    other_sampler = SAMPLER.model_copy(update={"guidance_scale": 3.0})
    assert plan_pool(store, model, other_sampler, pool, PROMPTS).pool_id != base


def test_stopping_keeps_finished_shards_and_resuming_gives_the_same_bits(tmp_path, model):
    undisturbed, _ = draw(tmp_path / "a", model)
    store, pool = Store(str(tmp_path / "b")), PoolConfig(images_per_prompt=3, prompts_per_shard=2, batch_size=4)
    plan = plan_pool(store, model, SAMPLER, pool, PROMPTS)
    asked = iter([False] * 2 + [True] * 9)  # the first shard has two batches
    with pytest.raises(StoppedError):
        plan.make(Worker("cpu", should_stop=lambda: next(asked)))
    assert list(plan.folder.manifests()) == [0]
    resumed, plan = draw(tmp_path / "b", model)
    assert [shard.index for shard in plan.missing] == [1]
    assert difference(undisturbed, resumed) == 0


def test_image_formats(tmp_path, model):
    png, _ = draw(tmp_path / "a", model, prompts=PROMPTS[:1])
    webp, _ = draw(tmp_path / "b", model, prompts=PROMPTS[:1], image_format="webp")
    jpeg, _ = draw(tmp_path / "c", model, prompts=PROMPTS[:1], image_format="jpeg")
    assert difference(png, webp) == 0
    assert difference(png, jpeg) > 0


def test_guidance_one_runs_the_conditional_branch_alone(tmp_path, model):
    plain = SAMPLER.model_copy(update={"guidance_scale": 1.0})
    store, pool = Store(str(tmp_path)), PoolConfig(images_per_prompt=1)
    plan = plan_pool(store, model, plain, pool, PROMPTS[:1])
    plan.make(Worker("cpu"))
    pipeline = StableDiffusionPipeline.from_pretrained(model.path)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    seed = image_seed(0, PROMPTS[0], 0)
    image = pipeline(PROMPTS[0], width=32, height=48, num_inference_steps=4, guidance_scale=1.0,
                     generator=torch.Generator().manual_seed(seed)).images[0]
    ours = decode_image(plan.folder.read(0)["image"][0].as_py())
    assert np.abs(np.asarray(image).astype(int) - np.asarray(ours).astype(int)).max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_rounded_on_the_device_as_diffusers_rounds_them(model, dtype):
    codec = ImageGenerator(model, SAMPLER, PoolConfig(), "cpu").backbone.codec
    vae = codec.vae.to(dtype)
    latents = torch.randn((3, 4, 6, 4), generator=torch.Generator().manual_seed(0)).to(dtype) * 5
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    expected = VaeImageProcessor().postprocess(decoded, output_type="pil")
    assert np.array_equal(codec.decode(latents).pixels, np.stack([np.asarray(image) for image in expected]))


def test_no_step_asks_the_device_where_it_stands(tmp_path, model, monkeypatch):
    def ask(*_):
        raise AssertionError("looked up a timestep")

    monkeypatch.setattr(DPMSolverMultistepScheduler, "index_for_timestep", ask)
    assert draw(tmp_path, model, prompts=PROMPTS[:1])[0]


# -- memory


def no_more_than(limit, monkeypatch):
    """Batches of more images do not fit into the memory; returns the sizes tried."""
    sizes, draw_batch = [], ImageGenerator.sample

    def draw_if_it_fits(self, prompt_embeds, seeds):
        sizes.append(len(seeds))
        if len(seeds) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw_batch(self, prompt_embeds, seeds)

    monkeypatch.setattr(ImageGenerator, "sample", draw_if_it_fits)
    return sizes


def test_a_batch_that_does_not_fit_is_halved_for_its_whole_shard_and_all_later_ones(tmp_path, model, monkeypatch,
                                                                                   caplog):
    expected, _ = draw(tmp_path / "a", model, batch_size=2)
    sizes = no_more_than(2, monkeypatch)
    images, plan = draw(tmp_path / "b", model, batch_size=5)
    assert sizes == [5, 2, 2, 2, 2, 1]  # six images in the first shard, three in the second
    assert images.keys() == expected.keys() and difference(images, expected) == 0
    assert {manifest.batch_size for manifest in plan.folder.manifests().values()} == {2}
    assert [record.message for record in caplog.records] == [
        "pool: 5 images do not fit into the memory of cpu together: 2 at a time from here on"]


def test_a_shard_that_stops_fitting_on_its_way_starts_again(tmp_path, model, monkeypatch):
    """One batch plan a shard: what was drawn with larger batches is drawn again."""
    expected, _ = draw(tmp_path / "a", model, prompts=PROMPTS[:2], batch_size=2)
    draw_batch, calls, seen = ImageGenerator.sample, [], []

    def full_at_the_second(self, prompt_embeds, seeds):
        calls.append(len(seeds))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw_batch(self, prompt_embeds, seeds)

    monkeypatch.setattr(ImageGenerator, "sample", full_at_the_second)
    pool = PoolConfig(images_per_prompt=3, prompts_per_shard=2, batch_size=4)
    plan = plan_pool(Store(str(tmp_path / "b")), model, SAMPLER, pool, PROMPTS[:2])
    assert plan.make(Worker("cpu", lambda *state: seen.append(state))) == 6
    assert calls == [4, 2, 2, 2, 2] and seen[-1] == (6, 6, "images")
    rows = plan.folder.read(0).to_pylist()
    images = {(row["prompt"], row["index"]): np.asarray(decode_image(row["image"])) for row in rows}
    assert len(rows) == 6 and difference(images, expected) == 0
    assert plan.folder.manifests()[0].batch_size == 2


def test_one_image_that_does_not_fit_is_one_clear_line(tmp_path, model, monkeypatch):
    no_more_than(0, monkeypatch)
    with pytest.raises(ConfigError, match=r"pool: a single image does not fit into the memory of cpu: .*target\.dtype"):
        draw(tmp_path, model, batch_size=2)


# -- writing beside drawing


def test_a_shard_is_written_while_the_next_is_drawn(tmp_path, model, monkeypatch):
    """The first commit waits until the second shard's images are drawn: were it not beside them, it would for ever."""
    second_drawn, commit, batches, draw_batch = threading.Event(), ShardFolder.commit, [], ImageGenerator.sample

    def commit_late(self, index, *arguments, **settings):
        assert index > 0 or second_drawn.wait(60)
        return commit(self, index, *arguments, **settings)

    def count(self, prompt_embeds, seeds):
        batches.append(len(seeds))
        if len(batches) == 3:  # the first shard has two batches
            second_drawn.set()
        return draw_batch(self, prompt_embeds, seeds)

    monkeypatch.setattr(ShardFolder, "commit", commit_late)
    monkeypatch.setattr(ImageGenerator, "sample", count)
    images, plan = draw(tmp_path, model)
    assert len(images) == 9 and list(plan.folder.manifests()) == [0, 1]


def test_a_shard_that_cannot_be_written_ends_the_work(tmp_path, model, monkeypatch):
    drawn, draw_batch = [], ImageGenerator.sample

    def refuse(*_, **__):
        raise StorageError("the disk is full")

    def count(self, prompt_embeds, seeds):
        drawn.append(len(seeds))
        return draw_batch(self, prompt_embeds, seeds)

    monkeypatch.setattr(ShardFolder, "commit", refuse)
    monkeypatch.setattr(ImageGenerator, "sample", count)
    with pytest.raises(StorageError, match="the disk is full"):
        draw(tmp_path, model, prompts_per_shard=1, batch_size=3)
    assert len(drawn) == 2  # the second shard was under way; no third began


def spoil(monkeypatch, rows, dtypes):
    """Decoding in one of `dtypes` gives NaN in the images of these numbers, counted over all that are decoded."""
    decode, count = AutoencoderKL.decode, itertools.count()

    def spoiled(self, latents, **options):
        images = decode(self, latents, **options)[0]
        if self.dtype in dtypes:
            images[[row for row in range(len(images)) if next(count) in rows]] = torch.nan
        return (images,)

    monkeypatch.setattr(AutoencoderKL, "decode", spoiled)


def test_an_image_that_half_precision_cannot_decode_is_decoded_in_float32(
        tmp_path, target_folder, monkeypatch, caplog):
    half = find_model(TargetConfig(source=str(target_folder), dtype="bfloat16"))
    plain, plan = draw(tmp_path / "a", half, PROMPTS[:2])
    assert plan.folder.find(0).details.keys() == {"prompt_ids"}
    spoil(monkeypatch, (1, 4), [torch.bfloat16])
    images, plan = draw(tmp_path / "b", half, PROMPTS[:2])
    assert plan.folder.find(0).details["rows_decoded_in_float32"] == [1, 4]
    assert [record.message for record in caplog.records] == [
        f"the VAE of {half.path} decodes images that are not finite in half precision: such images are decoded again "
        "in float32"]
    kept = {key: pixels for number, (key, pixels) in enumerate(plain.items()) if number not in (1, 4)}
    assert difference(kept, images) == 0 and 0 < difference(plain, images) < 10


def test_an_image_that_no_precision_decodes_is_refused(tmp_path, target_folder, model, monkeypatch):
    spoil(monkeypatch, range(100), [torch.bfloat16, torch.float32])
    for each in (model, find_model(TargetConfig(source=str(target_folder), dtype="bfloat16"))):
        with pytest.raises(ModelError, match="decodes images that are not finite, also in float32"):
            draw(tmp_path, each)


def test_latents_that_are_not_finite_are_refused(tmp_path, model, monkeypatch):
    monkeypatch.setattr(image_generator, "sample_latents",
                        lambda *_, **__: torch.full((4, 4, 6, 4), torch.inf))
    with pytest.raises(ModelError, match=r"generates images that are not finite in float32: check its weights"):
        draw(tmp_path, model)


def test_a_batch_waits_for_the_device_once(model, monkeypatch):
    """Before its images are copied: for whether latents and images are finite, together."""
    generator, waits = ImageGenerator(model, SAMPLER, PoolConfig(), "cpu"), []
    for name in ("tolist", "__bool__", "item"):
        known = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name,
                            lambda tensor, name=name, known=known: waits.append(name) or known(tensor))
    decoded = generator.backbone.codec.decode(torch.zeros(3, 4, 6, 4))
    assert waits == ["tolist"] and decoded.in_float32 == [] and decoded.pixels.shape == (3, 48, 32, 3)
