"""The comparison of two models' images, from shards to numbers; scores are written by hand, so these are known."""

import json

import numpy as np
import pyarrow as pa
import pytest

from hgdpo_core.config import EvaluationConfig, PoolConfig, PromptSource, SamplerConfig, ScorerConfig, TargetConfig
from hgdpo_core.errors import InputError
from hgdpo_core.evaluate import compare, image_scores, look_at_images, plan_evaluation, refuse_seen_prompts
from hgdpo_core.images import encode_image
from hgdpo_core.metrics import colour_shift
from hgdpo_core.models import find_model
from hgdpo_core.prompts import prompt_id
from hgdpo_core.scorers import defect_limit, pickscore
from hgdpo_core.stages.pool import SCHEMA, PoolPlan
from hgdpo_core.stages.scores import SCHEMA as SCORE_SCHEMA
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

PROMPTS = ["a woman in a red top", "a man in a blue top", "a girl with black hair waves"]
CONFIG = EvaluationConfig(prompts=PromptSource(source="p.txt"), images_per_prompt=2, scorers=(ScorerConfig(),))
SAMPLER = SamplerConfig(width=8, height=8, steps=1)


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


@pytest.fixture
def models(target_folder):
    target = find_model(TargetConfig(source=str(target_folder), dtype="float32", negative_prompt="target"))
    return target, find_model(TargetConfig(source=str(target_folder), dtype="float32", negative_prompt="tuned"))


def write_images(store, model, seed: int, prompts=PROMPTS) -> tuple[PoolPlan, np.ndarray]:
    """A committed pool of random images, [P, 2, 8, 8, 3]."""
    plan = plan_evaluation(store, model, SAMPLER, PoolConfig(prompts_per_shard=2), CONFIG, prompts)
    pixels = np.random.default_rng(seed).integers(0, 256, (len(prompts), 2, 8, 8, 3), dtype=np.uint8)
    for shard in plan.shards:
        rows = [{"prompt_id": prompt_id(p), "prompt": p, "index": j, "seed": 0, "width": 8, "height": 8,
                 "image": encode_image(pixels[prompts.index(p), j], "png")} for p in shard.prompts for j in (1, 0)]
        plan.folder.commit(shard.index, pa.Table.from_pylist(rows, schema=SCHEMA),
                           details={"prompt_ids": shard.prompt_ids})
    return plan, pixels


def write_scores(store, plan: PoolPlan, scores: list[list[float]], prompts=PROMPTS) -> ShardFolder:
    folder = ShardFolder.create(store, f"scores/{plan.pool_id}/by-hand", {"pool": plan.pool_id})
    for shard in plan.shards:
        rows = [{"prompt_id": prompt_id(p), "index": j, "score": scores[prompts.index(p)][j]}
                for p in shard.prompts for j in (1, 0)]
        folder.commit(shard.index, pa.Table.from_pylist(rows, schema=SCORE_SCHEMA))
    return folder


def test_every_number_is_that_of_the_images(store, models, monkeypatch):
    monkeypatch.setattr(pickscore, "DEFECT_BELOW", 0.0, raising=False)
    target, before = write_images(store, models[0], 1)
    tuned, after = write_images(store, models[1], 2)
    target_scores = write_scores(store, target, [[-1, 2], [-1, -1], [3, 4]])
    tuned_scores = write_scores(store, tuned, [[1, 2], [-2, 0], [3, 5]])
    result = compare(store, target, tuned, {"pickscore": target_scores}, {"pickscore": tuned_scores}, PROMPTS, CONFIG)

    assert image_scores(target_scores, target, PROMPTS[::-1]).tolist() == [[3, 4], [-1, -1], [-1, 2]]
    assert result.target_scores["pickscore"] == [0.5, -1.0, 3.5]
    rate, change = result.win_rates["pickscore"], result.score_changes["pickscore"]
    assert (rate.wins, rate.losses, rate.ties) == (2, 0, 1)
    assert change.mean == pytest.approx(0.5) and change.sign_test_p == 0.5  # changes 1, 0, 0.5; two wins of two
    assert result.win_rate_intervals["pickscore"] is not None and result.images_per_prompt == 2
    defects = result.defects["pickscore"]
    assert (defects.target, defects.tuned) == (pytest.approx(3 / 6), pytest.approx(1 / 6))
    assert result.colour_shift == pytest.approx(colour_shift(after.reshape(-1, 8, 8, 3), before.reshape(-1, 8, 8, 3)))
    assert result.colour_change.hue_degrees.value == pytest.approx(result.colour_shift.hue_degrees)
    assert sum(result.target_histograms.as_dict()["value"]) == pytest.approx(1, abs=1e-4)
    assert result.lora_weight is None
    spreads = [np.sqrt((side.reshape(3, 2, -1) / 255).var(axis=1).sum(axis=1).mean()) for side in (after, before)]
    assert result.variety_change.value == pytest.approx(100 * (spreads[0] / spreads[1] - 1), rel=1e-4)

    saved = store.read_json(f"evaluations/{result.evaluation_id}/result.json")
    assert {name: saved[name] for name in result.findings()} == json.loads(json.dumps(result.findings()))
    assert set(saved["colour_histograms"]) == {"target", "tuned"}


def test_one_image_a_prompt_needs_no_bootstrap_and_a_plain_scorer_knows_no_defects(store, models):
    assert defect_limit("pickscore") is None
    single = CONFIG.model_copy(update={"images_per_prompt": 1})
    target, _ = write_images(store, models[0], 1)
    tuned, _ = write_images(store, models[1], 2)
    scores = [[1.0, 2.0]] * 3
    folders = {"pickscore": write_scores(store, target, scores)}, {"pickscore": write_scores(store, tuned, scores)}
    result = compare(store, target, tuned, *folders, PROMPTS, single)
    assert result.win_rate_intervals == {} and result.defects == {}
    assert result.win_rates["pickscore"].rate is None and result.score_changes["pickscore"].sign_test_p == 1.0


def test_prompts_outside_the_evaluation_do_not_count(store, models):
    plan, pixels = write_images(store, models[0], 1)
    colours, thumbnails = look_at_images(plan, PROMPTS[1:2])
    assert thumbnails.shape == (1, 2, 192)
    np.testing.assert_allclose(thumbnails[0, 1], pixels[1, 1].reshape(-1) / 255, rtol=1e-6)  # 8 x 8 stays as it is
    assert len(colours.statistics) == 1 and colours.total().pixels == 2 * 64
    assert colours.total().shift_from(look_at_images(plan, PROMPTS)[0].total()) == pytest.approx(
        colour_shift(pixels[1], pixels.reshape(-1, 8, 8, 3)))


def test_seen_prompts_are_refused():
    refuse_seen_prompts(["a"], ["b"])
    with pytest.raises(InputError, match="1 of 2 evaluation prompts occur in training .*, the first is 'a'"):
        refuse_seen_prompts(["a", "c"], ["a", "b"])


@pytest.mark.parametrize("prompt", ["a woman in red ", "A Woman in red", "a  woman\tin red", "a woman in red\u00a0"])
def test_a_prompt_that_a_text_encoder_reads_alike_is_not_held_out(prompt):
    with pytest.raises(InputError, match="1 of 2 evaluation prompts occur in training .case and spaces aside."):
        refuse_seen_prompts(["a man", prompt], ["a woman in red"])
