"""Summary and report of a run, without Prefect: images and scores are made by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hand_pools import HELD_OUT, PROMPTS, RATES, draw

from hgdpo_core.config import ScorerConfig
from hgdpo_core.config.presets import figures
from hgdpo_core.evaluate import compare
from hgdpo_core.prompts import prompt_id
from hgdpo_core.report.model_card import render_card
from hgdpo_core.report.summary import RankedData, _notes, write_comparison_report, write_run_report
from hgdpo_core.scorers.towers import OPENAI_CLIP
from hgdpo_core.stages.scores import SCHEMA
from hgdpo_core.stages.triplets import TripletCounts
from hgdpo_core.statistics.checks import RunWarning
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

LOG = [{"step": 1.0, "loss": 0.5}]


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def make_plan(store, pool_id, prompts, candidates, model=0):
    """A pool whose shards are all there, in the shape of a PoolPlan."""
    folder = draw(store, pool_id, prompts, candidates, model=model)
    ids = [prompt_id(prompt) for prompt in prompts]
    shards = [SimpleNamespace(index=index, prompt_ids=ids[2 * index:2 * index + 2]) for index in folder.manifests()]
    lora = SimpleNamespace(weight=0.5) if model else None
    return SimpleNamespace(folder=folder, indices=[shard.index for shard in shards], shards=shards, pool_id=pool_id,
                           images=len(prompts) * candidates, model=SimpleNamespace(lora=lora),
                           pool=SimpleNamespace(images_per_prompt=candidates, race=()))


def make_scores(store, plan, prompts, scores):
    folder = ShardFolder.create(store, f"scores/{plan.pool_id}/by-hand", {"pool": plan.pool_id})
    for index in plan.indices:
        rows = [{"prompt_id": prompt_id(prompt), "index": i, "score": float(score)}
                for prompt in prompts[2 * index:2 * index + 2] for i, score in enumerate(scores[prompt])]
        folder.commit(index, pa.Table.from_pylist(rows, schema=SCHEMA))
    return folder


@pytest.fixture
def compared(store):
    images = {who: make_plan(store, who, HELD_OUT, 1, model) for model, who in enumerate(("target", "tuned"))}
    scores = [{"pickscore": make_scores(store, plan, HELD_OUT, {prompt: [rates[model]] for prompt, rates
                                                               in zip(HELD_OUT, RATES["one"], strict=True)})}
              for model, plan in enumerate(images.values())]
    return images, compare(store, images["target"], images["tuned"], *scores, HELD_OUT, figures().evaluation)


def open_run(store, stated=(), **config):
    target = SimpleNamespace(schedule=lambda: dict(stated))
    return SimpleNamespace(store=store, run_id="run-1", key=lambda name: f"runs/run-1/{name}", command="hgdpo run",
                           target=target, images=None,
                           config=figures().model_copy(update=config), prompts=SimpleNamespace(prompts=PROMPTS))


def write_run(store, compared, seconds, cached, stated=()):
    images, comparison = compared
    pool = make_plan(store, "pool", PROMPTS, 4)
    scores = make_scores(store, pool, PROMPTS, {prompt: [1, 2, 3, 4] for prompt in PROMPTS})
    return write_run_report(
        open_run(store, stated),
        RankedData(pool, scores, np.zeros((4, 3, 2)), SimpleNamespace(key="triplets/1"), TripletCounts(4, 0)),
        SimpleNamespace(model_id="dpo-1", objective="dpo", log=LOG), LOG, images, comparison,
        [RunWarning("defects", "More defects.")], seconds=seconds, cached=cached)


def test_a_run_has_a_summary_and_a_page_without_prefect(store, compared):
    published = write_run(store, compared, {"pool": 2.0}, [])
    summary, root = store.read_json("runs/run-1/summary.json"), store.root
    assert json.loads(json.dumps(published.summary)) == summary
    assert set(summary) == {
        "preset", "root", "run_id", "win_rate", "win_rate_bootstrap", "score_change", "defect_rate", "colour_shift",
        "colour_change", "variety_change", "lora_weight", "images_per_prompt", "evaluation_id", "evaluation_prompts",
        "warnings", "triplets", "rejected", "pool_images", "lora_id", "timings", "found", "artifacts"}
    assert summary["lora_id"] == "dpo-1" and summary["found"] == [] and summary["pool_images"] == 16
    assert summary["artifacts"] == {
        "report": f"{root}/runs/run-1/report.html", "summary": f"{root}/runs/run-1/summary.json",
        "lora": f"{root}/models/dpo-1", "triplets": f"{root}/triplets/1", "pool": f"{root}/pools/pool"}
    page = store.read_bytes("runs/run-1/report.html").decode()
    assert "More defects." in page and "Latent statistics by rank" in page and "a woman &lt;b&gt;|" in page
    assert len(published.data.pools) == 2 and len(published.data.pairs) == 3
    assert [len(side) for side in (published.data.best_wins, published.data.worst_losses)] == [2, 1]


def test_what_a_single_file_predicts_is_in_the_summary_and_on_the_card(store, compared):
    stated = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    summary = write_run(store, compared, {}, [], stated).summary
    assert summary["scheduler"] == stated
    settings = 'prediction_type="v_prediction", rescale_betas_zero_snr=True)'
    for images in (None, "photos"):  # fine-tuned it is a folder, whose scheduler says so itself
        config = figures().model_copy(update={"images": images})
        assert (settings in render_card(config, summary, kohya_name="x.safetensors", fused=False)) == (images is None)


def test_a_cached_stage_keeps_the_seconds_in_which_it_was_made(store, compared):
    write_run(store, compared, {"pool": 20.0, "dpo": 30.0}, [])
    again = write_run(store, compared, {"pool": 0.1, "dpo": 31.0, "new": 0.2}, ["pool", "new"]).summary
    assert again["timings"] == {"pool": 20.0, "dpo": 31.0, "new": 0.2} and again["found"] == ["pool", "new"]


def test_a_comparison_names_both_models_and_its_weights(store, compared):
    images, comparison = compared
    run = open_run(store, tuned="my/lora")
    summary = write_comparison_report(run, images, comparison, [comparison], seconds={}, cached=[]).summary
    assert (summary["tuned"], summary["target"]) == ("my/lora", "figures") and "lora_id" not in summary
    assert [point["lora_weight"] for point in summary["lora_weights"]] == [0.5]
    assert summary["artifacts"]["tuned_images"] == store.url("pools/tuned")
    assert "LoRA weight" in store.read_bytes("runs/run-1/report.html").decode()
    assert "lora_weights" not in write_comparison_report(run, images, comparison, [], seconds={}, cached=[]).summary


def test_the_page_names_the_clip_checkpoint_and_the_built_in_scorer():
    assert _notes((ScorerConfig(name="clip"),)) == [f"CLIP scores are from {OPENAI_CLIP}."]
    clip, figures = _notes((ScorerConfig(name="clip", source="my/clip"), ScorerConfig(source="figures")))
    assert "my/clip" in clip and "trained on drawings" in figures
    assert _notes((ScorerConfig(),)) == []
