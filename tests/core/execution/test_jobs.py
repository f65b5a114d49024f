"""Ranges of shards: the same rows wherever they are made, from nothing but the store and a request."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny

from hgdpo_core.config import PoolConfig, SamplerConfig, ScorerConfig, TargetConfig, TripletConfig
from hgdpo_core.errors import ConfigError, ModelError, StoppedError
from hgdpo_core.execution.jobs import MAX_SHARD_RUNS, ShardRequest, cut, run_name, run_shards, write_recipe
from hgdpo_core.execution.runner import IN_PROCESS
from hgdpo_core.models import find_model
from hgdpo_core.models.locations import find_located_model, model_locations
from hgdpo_core.models.published import publish_model
from hgdpo_core.prompts import PromptList, save_prompts
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.distances import DistanceStage
from hgdpo_core.stages.features import FeatureStage, feature_folder
from hgdpo_core.stages.latents import LatentStage, latent_folder
from hgdpo_core.stages.pool import PlannedShard, plan_pool
from hgdpo_core.stages.scores import ScoreStage, score_folder
from hgdpo_core.stages.triplets import TripletStage
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder, format_range, parse_range
from hgdpo_core.storage.version import code_version

SAMPLER = SamplerConfig(width=32, height=32, steps=2, guidance_scale=2.0)
POOL = PoolConfig(images_per_prompt=2, prompts_per_shard=1, batch_size=2)
IMAGES = POOL.images_per_prompt * POOL.prompts_per_shard
"""Of one shard."""
PROMPTS = ["a woman in a red top", "a man in a blue top", "a girl with black hair waves"]


@pytest.fixture
def model(target_folder):
    return find_model(TargetConfig(source=str(target_folder), dtype="float32", negative_prompt="blurry"))


@pytest.fixture
def judge(judge_folder):
    return ScorerConfig(source=str(judge_folder))


def plan(root, model):
    return plan_pool(Store(str(root)), model, SAMPLER, POOL, PROMPTS)


def requests(stage, images_per_run=None, *, copy_to_store=False):
    """What a runner makes of a stage."""
    write_recipe(stage, copy_to_store=copy_to_store)
    return cut(stage, stage.find_missing(), images_per_run)


def rows(folder: ShardFolder):
    return [folder.read(index).to_pylist() for index in folder.manifests()]


def again(request: ShardRequest) -> ShardRequest:
    """As a worker gets it: through JSON, nothing else shared."""
    return ShardRequest.model_validate_json(request.model_dump_json())


def test_a_request_and_the_store_are_enough_for_every_stage(tmp_path, model, judge):
    undisturbed = plan(tmp_path / "a", model)
    undisturbed.make(Worker())
    there = plan(tmp_path / "b", model)
    for request in requests(there, IMAGES):
        assert run_shards(again(request)) == 2
    assert rows(there.folder) == rows(undisturbed.folder)

    scores = [score_folder(p.folder.store, p.pool_id, judge) for p in (undisturbed, there)]
    ScoreStage.of(undisturbed, judge).make(Worker())
    assert sum(run_shards(again(r)) for r in requests(ScoreStage.of(there, judge), 2 * IMAGES)) == 6
    assert rows(scores[0]) == rows(scores[1])

    features = [feature_folder(p.folder.store, p.pool_id, judge) for p in (undisturbed, there)]
    FeatureStage.of(undisturbed, judge).make(Worker())
    assert sum(run_shards(again(r)) for r in requests(FeatureStage.of(there, judge), 2 * IMAGES)) == 6
    assert rows(features[0]) == rows(features[1])
    assert requests(FeatureStage.of(there, judge)) == []

    distances = DistanceStage.of(there, scores[1], model)
    assert sum(run_shards(again(r)) for r in requests(distances, 2 * IMAGES)) == len(PROMPTS)
    assert distances.read().shape == (len(PROMPTS), 1, 2)
    assert requests(distances) == []

    prompts = PromptList(tuple(PROMPTS))
    save_prompts(there.folder.store, prompts)
    triplets = TripletStage.of(there, scores[1], prompts, TripletConfig())
    assert sum(run_shards(again(r)) for r in requests(triplets, 2 * IMAGES)) == len(PROMPTS)
    assert requests(triplets) == []

    latents = LatentStage.of(triplets, model)
    assert IN_PROCESS.make([latents]) == [len(PROMPTS)] and IN_PROCESS.make([latents]) == [0]
    assert [len(table) for table in rows(latents.folder)] == [len(table) for table in rows(triplets.folder)]


def test_a_worker_reads_prompts_as_the_planner_does(tmp_path, target_folder):
    """Also in an evaluation, whose prompts are plain while the negative prompt is not."""
    weighted = find_model(TargetConfig(source=str(target_folder), dtype="float32", negative_prompt="(blurry:1.4)",
                                       prompt_syntax="a1111"))
    for planned in (weighted, weighted.reading("plain")):
        there = plan(tmp_path, planned)
        means = model_locations(there.folder.store, planned, copy_to_store=False)
        assert find_located_model(there.folder.store, there.folder.config["model"], means) == planned
        latents = latent_folder(there.folder.store, there.folder, planned, (32, 32))
        assert find_located_model(there.folder.store, latents.config, means) == planned


def test_only_what_is_missing_is_made_and_each_shard_is_told(tmp_path, model):
    there = plan(tmp_path, model)
    first, *_ = requests(there, IMAGES)
    run_shards(first)
    request, = requests(plan(tmp_path, model), 3 * IMAGES)
    seen = []
    assert run_shards(request, on_shard=lambda manifest: seen.append((manifest.index, manifest.rows))) == 4
    assert request.shards == "0-2" and seen == [(1, 2), (2, 2)]
    assert run_shards(request, on_shard=seen.append) == 0 and len(seen) == 2


def test_a_stopped_range_keeps_its_finished_shards(tmp_path, model):
    stage = plan(tmp_path, model)
    request, = requests(stage)
    answers = iter([False, True])
    with pytest.raises(StoppedError):
        run_shards(request, should_stop=lambda: next(answers))
    assert list(stage.folder.manifests()) == [0]


def test_other_code_and_other_formats_are_refused_with_both_names(tmp_path, model):
    request, = requests(plan(tmp_path, model))
    with pytest.raises(ConfigError, match=r"code version .*\+[0-9a-f]{8}, the run that planned this work has 0\.0\.9"):
        run_shards(request.model_copy(update={"code_version": "0.0.9"}))
    with pytest.raises(ConfigError, match="format version 1, the run that planned this work has 7"):
        run_shards(request.model_copy(update={"format_version": 7}))


def test_another_model_at_the_same_place_is_refused(tmp_path, target_folder):
    location = shutil.copytree(target_folder, tmp_path / "model")
    there = plan(tmp_path / "root", find_model(TargetConfig(source=str(location), dtype="float32")))
    request, = requests(there)
    shutil.rmtree(location)
    with pytest.raises(ModelError, match="is not on this machine"):
        run_shards(request)
    tiny.save_target(location, seed=1)
    with pytest.raises(ModelError, match="planned with"):
        run_shards(request)


def test_a_shared_model_and_judge_are_found_in_the_store_and_not_on_the_disk(tmp_path, target_folder, judge_folder):
    target, judge = tmp_path / "model", tmp_path / "judge"
    shutil.copytree(target_folder, target)
    shutil.copytree(judge_folder, judge)
    there = plan(tmp_path / "root", find_model(TargetConfig(source=str(target), dtype="float32")))
    request, = requests(there, copy_to_store=True)
    run = [lambda: run_shards(request)]
    there.make(Worker())
    scoring, = requests(ScoreStage.of(there, ScorerConfig(source=str(judge))), copy_to_store=True)
    run.append(lambda: run_shards(scoring))
    for location in (target, judge):
        shutil.rmtree(location)
    for path in there.folder.store.local_path(there.folder.key).glob("shard-*"):
        path.unlink()
    assert [step() for step in run] == [6, 6]


def test_a_model_of_the_store_is_named_by_its_id(tmp_path, target_folder):
    store = Store(str(tmp_path / "root"))
    path = publish_model(store, "sft-1", target_folder, {"kind": "pipeline"})
    there = plan(tmp_path / "root", find_model(TargetConfig(source=str(path), dtype="float32")))
    write_recipe(there)
    means = store.read_json(f"{there.folder.key}/means.json")
    assert means["model"]["model_id"] == "sft-1" and str(tmp_path) not in json.dumps(means)


def test_ranges_are_cut_from_all_requested_shards_so_that_a_second_attempt_meets_them(tmp_path, model):
    there = plan(tmp_path, model).titled("tuned")

    def planned(count, prompts):
        shards = tuple(PlannedShard(index, prompts.get(index, ())) for index in range(count))
        return replace(there, pool=POOL, shards=shards, folder=there.folder)

    ten = planned(10, {4: ("a very long prompt that is too long for a list of runs", "b"), 9: ("c",)})
    requests = cut(ten, [4, 9], 9)  # 2 images per shard
    assert [request.shards for request in requests] == ["4-7", "8-9"]
    assert requests[0].tag == f"shard:{there.pool_id}:4"
    assert run_name(ten, requests[0]) == "tuned 4-7: a very long prompt that… to b"
    assert run_name(ten, requests[1]) == "tuned 8-9: c"
    assert [request.shards for request in cut(ten, [4, 9], 1)] == ["4", "9"]    # at least a shard
    assert [request.shards for request in cut(ten, [4, 9])] == ["0-9"] and cut(ten, []) == []
    many = planned(1000, {})
    assert len(cut(many, many.indices, 2)) <= MAX_SHARD_RUNS
    assert run_name(many, cut(many, many.indices, 2)[0]) == "tuned 0-3"
    assert len(cut(many, many.indices, 2000)) == 1 and len(cut(many, many.indices, 2000, least_runs=4)) == 4
    assert len(cut(many, many.indices, 200, least_runs=4)) == 10
    assert len(cut(many, many.indices, 2, least_runs=900)) <= MAX_SHARD_RUNS


def test_ranges_survive_their_text():
    assert format_range([5, 0, 1, 2]) == "0-2,5" and parse_range("0-2,5") == [0, 1, 2, 5]
    assert parse_range(format_range([7])) == [7]


def test_a_request_needs_an_absolute_root():
    settings = {"folder": "pools/x", "stage": "pool", "shards": "0", "code_version": code_version(),
                "format_version": 1}
    with pytest.raises(ValueError, match="relative"):
        ShardRequest(root="output/full", **settings)
    with pytest.raises(ValueError, match="shards"):
        ShardRequest(root="s3://bucket", **(settings | {"shards": "all"}))
