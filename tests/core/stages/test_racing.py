"""Racing: only a prompt's best and worst candidates are finished; the others are counted, and stay out of the rows."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from hgdpo_core.ablate.settings import build_settings, check
from hgdpo_core.config import PoolConfig, RaceCut, SamplerConfig, ScorerConfig, TargetConfig, TripletConfig
from hgdpo_core.config.base import apply_overrides as override
from hgdpo_core.config.presets import build_config
from hgdpo_core.errors import ConfigError, ModelError, StoppedError
from hgdpo_core.evaluate import plan_evaluation
from hgdpo_core.images import decode_image
from hgdpo_core.models import find_model, racing
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.models.racing import relative_cost
from hgdpo_core.models.sampling import initial_noise
from hgdpo_core.pipeline import run_all, write_report
from hgdpo_core.plan.planner import plan_run
from hgdpo_core.plan.rates import measured
from hgdpo_core.prompts import PromptList, image_seed
from hgdpo_core.rescore.plan import plan_requested
from hgdpo_core.run import open_run
from hgdpo_core.stages import pool as pool_stage
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.distances import DistanceStage
from hgdpo_core.stages.pool import PoolPlan, plan_pool
from hgdpo_core.stages.scores import ScoreStage
from hgdpo_core.stages.triplets import TripletStage
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder, read_table

SAMPLER = SamplerConfig(width=32, height=48, steps=6, guidance_scale=3.0)
PROMPTS = ["a woman in a red top", "a man in a blue top", "a girl with black hair waves"]
SCORER = ScorerConfig(source="figures")
WHOLE = {"images_per_prompt": 7, "prompts_per_shard": 2, "batch_size": 4}
ONE_CUT, TWO_CUTS = (RaceCut(after=2, keep=4),), (RaceCut(after=2, keep=5), RaceCut(after=4, keep=2))


class Redness:
    """Scores an image by its mean red, and keeps what it was shown."""

    def __init__(self):
        self.shown = []

    def score(self, images, prompts):
        self.shown += prompts
        return torch.tensor(np.asarray(images)[..., 0].mean(axis=(1, 2)).tolist())


@pytest.fixture
def scorer(monkeypatch):
    found = Redness()
    monkeypatch.setattr(pool_stage, "load_configured_scorer", lambda *_: found)
    return found


@pytest.fixture
def model(target_folder):
    return find_model(TargetConfig(source=str(target_folder), dtype="float32", negative_prompt="blurry"))


def plan(root, model, race, **settings):
    pool = PoolConfig.model_validate(WHOLE | {"race": race} | settings)
    return plan_pool(Store(str(root)), model, SAMPLER, pool, PROMPTS, SCORER)


def draw(root, model, race, **settings):
    """{(prompt, index): pixels} of a pool, and its plan."""
    made = plan(root, model, race, **settings)
    made.make(Worker("cpu"))
    rows = [row for index in made.indices for row in made.folder.read(index).to_pylist()]
    return {(row["prompt"], row["index"]): np.asarray(decode_image(row["image"])) for row in rows}, made


def predicted_redness(model, prompt, index, steps):
    """The mean red of a candidate's clean image, as the noise that the last step predicted amounts to."""
    generator = ImageGenerator(model, SAMPLER, PoolConfig(), "cpu")
    backbone, text = generator.backbone, generator.backbone.text.encode([prompt])[0]
    negative, scheduler = backbone.text.negative(text.length), backbone.schedule.solver()
    latents = initial_noise([image_seed(0, prompt, index)], *backbone.latent_shape((32, 48)))
    scheduler.set_timesteps(SAMPLER.steps)
    chain: Any = backbone.schedule.chain  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        for timestep in scheduler.timesteps[:steps]:
            without, conditional = (backbone.denoiser(latents, timestep, each) for each in (negative, text))
            noise = without + SAMPLER.guidance_scale * (conditional - without)
            kept = chain.alphas_cumprod[timestep]
            clean = (latents - (1 - kept).sqrt() * noise) / kept.sqrt()
            latents = scheduler.step(noise, timestep, latents).prev_sample
    return backbone.codec.decode(clean).pixels[..., 0].mean()


def test_the_reddest_and_the_least_red_are_finished_as_in_a_whole_pool(tmp_path, model, scorer):
    whole, _ = draw(tmp_path / "whole", model, ())
    raced, made = draw(tmp_path / "raced", model, ONE_CUT)
    for prompt in PROMPTS:
        redness = [predicted_redness(model, prompt, index, 2) for index in range(7)]
        order = np.argsort(redness)[::-1]
        assert {index for text, index in raced if text == prompt} == {*order[:2], *order[-2:]}
    for key, pixels in raced.items():
        assert np.abs(pixels.astype(int) - whole[key].astype(int)).max() <= 1, key  # float32 in other batches
    assert len(raced) == 3 * 4 and made.folder.config["race"] == [{"after": 2, "keep": 4}]


@pytest.mark.parametrize("race", [ONE_CUT, TWO_CUTS])
def test_rows_and_ended_candidates_are_all_candidates(tmp_path, model, scorer, race):
    raced, made = draw(tmp_path, model, race)
    ended, manifests = [], made.folder.manifests()
    for index, manifest in manifests.items():
        table = read_table(made.folder.store, f"{made.folder.key}/rejected/shard-{index:05d}.parquet")
        assert table.num_rows == manifest.details["ended"] and manifest.units == manifest.rows + table.num_rows
        ended += table.to_pylist()
    out = {(row["prompt"], row["index"]) for row in ended}
    assert not out & raced.keys()
    assert out | raced.keys() == {(prompt, index) for prompt in PROMPTS for index in range(7)}
    assert len(ended) + len(raced) == made.images == 21
    assert sum(manifest.rows for manifest in manifests.values()) == made.folder.config["expected"]["rows"] == len(raced)
    assert {row["step"] for row in ended} == {cut.after for cut in race}
    assert all(row["seed"] == image_seed(0, row["prompt"], row["index"]) for row in ended)
    assert all(math.isfinite(row["score"]) and "neither among" in row["reason"] for row in ended)
    assert len(scorer.shown) == 21 + (15 if len(race) == 2 else 0)


def test_the_same_bits_again_in_threads_and_after_a_stop(tmp_path, model, scorer, monkeypatch):
    raced, _ = draw(tmp_path / "a", model, TWO_CUTS)
    monkeypatch.setattr("hgdpo_core.models.image_generator.count_threads", lambda *_: 3)
    threaded, _ = draw(tmp_path / "b", model, TWO_CUTS)
    stopped, asked = plan(tmp_path / "c", model, TWO_CUTS), iter([False] * 9)
    with pytest.raises(StoppedError, match="finished shards are kept"):
        stopped.make(Worker("cpu", should_stop=lambda: next(asked, True)))
    again, _ = draw(tmp_path / "c", model, TWO_CUTS)
    for other in (threaded, again):
        assert other.keys() == raced.keys() and all((other[key] == raced[key]).all() for key in raced)


def test_triplets_name_the_candidates(tmp_path, model, scorer):
    raced, made = draw(tmp_path, model, ONE_CUT)
    scores = ScoreStage.of(made, SCORER)
    scores.make(Worker("cpu", network=ScoredByRedness()))
    assert scores.units(scores.indices, [{}]) == {0: 8, 1: 4}
    triplets = TripletStage.of(made, scores.folder, PromptList(tuple(PROMPTS)), TripletConfig())
    assert triplets.units(triplets.indices, [{}, {}]) == {0: 2, 1: 1}
    triplets.make(Worker("cpu"))
    rows = [row for index in triplets.indices for row in triplets.folder.read(index).to_pylist()]
    assert len(rows) == 3 and {row["pool_size"] for row in rows} == {4}
    for row in rows:
        own = {index: pixels[..., 0].mean() for (prompt, index), pixels in raced.items() if prompt == row["caption"]}
        best, worst = (choose(own, key=own.__getitem__) for choose in (max, min))
        assert (row["winner_index"], row["loser_index"]) == (best, worst)
        assert row["winner_seed"] == image_seed(0, row["caption"], row["winner_index"])
        assert (np.asarray(decode_image(row["jpg_1"])) == raced[row["caption"], row["loser_index"]]).all()
    assert DistanceStage.of(made, scores.folder, model).read().shape == (0, 6, 2)


class ScoredByRedness(Redness):
    name, fingerprint = "pickscore", "red"

    def prepare(self, image):
        return np.asarray(image)


def test_a_worker_opens_the_request_with_the_same_scorer(tmp_path, model, scorer):
    made = plan(tmp_path, model, ONE_CUT)
    opened = PoolPlan.open(made.folder, made.recipe(), made.indices)
    assert opened.scorer == SCORER and opened.pool.race == ONE_CUT and opened.missing_images == 21
    changed = ShardFolder(made.folder.store, made.folder.key, {
        **made.folder.config, "race_scorer": {**made.folder.config["race_scorer"], "fingerprint": "another"}})
    with pytest.raises(ModelError, match="the scorer pickscore found here has fingerprint"):
        PoolPlan.open(changed, made.recipe(), made.indices)


def test_what_decides_the_images_is_in_the_id(tmp_path, model):
    base = plan(tmp_path, model, ())
    assert "race" not in base.folder.config and "race_scorer" not in base.folder.config
    half = plan_pool(base.folder.store, model, SAMPLER, base.pool, PROMPTS, SCORER.model_copy(update={"dtype": "tf32"}))
    assert half.pool_id == base.pool_id  # a whole pool does not depend on the scorer
    raced = [plan_pool(base.folder.store, model, SAMPLER, base.pool.model_copy(update={"race": race}), PROMPTS, scorer)
             for race, scorer in ((ONE_CUT, SCORER), (TWO_CUTS, SCORER), (ONE_CUT, SCORER.model_copy(
                 update={"dtype": "tf32"})))]
    assert len({base.pool_id, *(each.pool_id for each in raced)}) == 4
    assert base.work != raced[0].work and base.scorer is half.scorer is None  # a plan takes no time of one for another
    fewer = plan(tmp_path, model, (), steps=3)
    assert fewer.pool_id == plan_pool(base.folder.store, model, SAMPLER.model_copy(update={"steps": 3}), base.pool,
                                      PROMPTS).pool_id != base.pool_id


def test_evaluations_are_neither_raced_nor_shortened(tmp_path, model):
    config = build_config("figures")
    pool = config.pool.model_copy(update={"race": ONE_CUT, "steps": 3})
    evaluation = plan_evaluation(Store(str(tmp_path)), model, SAMPLER, pool, config.evaluation, PROMPTS)
    assert evaluation.pool.race == () and evaluation.sampler.steps == SAMPLER.steps


def test_candidates_that_cannot_be_scored_are_neither_best_nor_worst():
    scores = {(0, 0): 1.0, (0, 1): math.nan, (0, 2): 3.0, (0, 3): 3.0, (0, 4): -math.inf, (0, 5): 2.0, (1, 0): 0.0,
              (1, 1): math.nan, (1, 2): math.nan}
    assert racing._choose(scores, 3) == {(0, 2), (0, 3), (0, 0), (1, 0), (1, 1), (1, 2)}
    assert {index for number, index in racing._choose(scores, 2) if number == 0} == {2, 0}


def test_cost_is_counted_in_steps():
    assert relative_cost((RaceCut(after=5, keep=6),), 20, 10) == pytest.approx(0.65)
    assert relative_cost((RaceCut(after=4, keep=10), RaceCut(after=7, keep=4)), 20, 10) == pytest.approx(0.61)
    assert relative_cost((), 20, 10) == 1.0


@pytest.mark.parametrize(("settings", "message"), [
    ({"pool.race": "5:20"}, "race cuts after step 5 to 20 of 20 images: each cut must come after the one before, and"),
    ({"pool.race": "5:6,4:2"}, "race cuts after step 4 to 2 of 6 images"),
    ({"pool.race": "5:1"}, "pool.race.0.keep: Input should be greater than or equal to 2"),
    ({"pool.race": "10:6"}, "pool.race cuts after step 10, but a pool is sampled in 10 steps: cut earlier"),
    ({"pool.race": "5:6", "pool.steps": 5}, "but a pool is sampled in 5 steps"),
    ({"pool.race": "5:6", "triplets.loser_rank": 3}, "triplets.loser_rank needs whole pools"),
    ({"pool.race": "5:6", "triplets.pool_size": 5}, "triplets.pool_size needs whole pools"),
])
def test_impossible_cuts_are_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        override(build_config("figures"), settings)
    assert "\n" not in str(caught.value)


def test_cuts_are_written_short():
    race = override(build_config("figures"), {"pool.race": "4:10,7:4"}).pool.race
    assert race == (RaceCut(after=4, keep=10), RaceCut(after=7, keep=4))
    assert override(build_config("figures"), {"pool.race": []}).pool.race == ()


@pytest.mark.parametrize(("settings", "message"), [
    ({}, "the comparison pool_size needs whole pools"),
    ({"comparisons": ["beta"]}, "the tinted world needs whole pools"),
])
def test_ablations_that_need_whole_pools_refuse(settings, message):
    config = override(build_config("figures"), {"pool.race": "5:6"})
    with pytest.raises(ConfigError, match=message):
        check(build_settings(settings), config)
    check(build_settings({"comparisons": ["beta"], "worlds": ["plain"]}), config)


def test_a_run_with_a_raced_pool(tmp_path, target_folder, judge_folder):
    """Whole, with its plan and its report; re-scoring by another scorer leaves its pool alone."""
    from tiny_run import tiny_parameters

    parameters = tiny_parameters(tmp_path, target_folder, judge_folder)
    parameters["images"] = None
    parameters["overrides"] |= {"sampler.steps": 3, "pool.images_per_prompt": 5, "pool.race": "1:4,2:2",
                                "pool.steps": 4}
    root = str(tmp_path / "root")
    run = open_run(root=root, **parameters)
    planned = {stage.stage: stage for stage in plan_run(run).stages}
    assert planned["pool"].total == 30 and planned["score"].total == 12 and planned["triplets"].total == 6
    result = run_all(run)
    pool = result.made.ranked.pool
    assert pool.folder.config["sampler"]["steps"] == 4 and result.made.images["target"].sampler.steps == 3
    manifests = pool.folder.manifests()
    seconds = sum(manifest.seconds for manifest in manifests.values())
    rate = measured(manifests.values(), "cpu")
    assert rate is not None and rate.seconds == pytest.approx(seconds / 30)
    summary = write_report(run, result).summary
    assert summary["pool_images"] == 30 and summary["finished_images"] == 12
    assert summary["triplets"] + summary["rejected"] == 6
    again = {stage.stage: stage.missing for stage in plan_run(run).stages}
    assert set(again.values()) == {0}
    for version, skipped in ((f"pickscore={judge_folder}", 0), ("inspector=figures", 1)):
        assert [(item.what, item.reason) for item in plan_requested(run.store, [version]).skipped] == [
            (f"pool {pool.pool_id}", "its images were chosen by another scorer's race, not by inspector's")] * skipped
