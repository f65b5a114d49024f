"""The whole method, top to bottom: the user's model and prompts in, a LoRA, its proof and a report out."""

from typing import Any, Literal

from prefect import flow
from pydantic import Field

from flows.timing import timed as _timed
from tasks.evaluate import judge
from tasks.generate import draw_evaluation, draw_pool
from tasks.guard import guard
from tasks.prepare import prepare, show_plan
from tasks.report import publish
from tasks.score import score
from tasks.sft import fine_tune
from tasks.train import train
from tasks.triplets import encode, rank
from tasks.ui import explain_own_errors

Overrides = dict[str, Any]


@flow(name="hgdpo", flow_run_name="{preset}", validate_parameters=True)
def hgdpo(
    preset: Literal["figures", "sd15"] = "figures",
    root: str | None = Field(None, description="object store, any fsspec URL; default: $HGDPO_ROOT, else output/full"),
    prompts: str | None = Field(None, description="txt, csv, tsv, jsonl or parquet, path or URL; or a data set"),
    target: str | None = Field(None, description="your model: diffusers folder, .safetensors file or hub id"),
    images: str | None = Field(None, description="folder of captioned images to fine-tune the model on first"),
    overrides: Overrides = Field(default_factory=dict, description='settings by dotted name, as {"dpo.beta": 1000}'),
    plan_only: bool = Field(False, description="say what the run would do and find, and stop"),
) -> dict[str, Any]:
    """Tune a model without human labels (HG-DPO, arXiv:2405.20216v1); returns the summary."""
    explain_own_errors()
    seconds: dict[str, float] = {}
    with _timed(seconds, "prepare"):
        run = prepare(preset, root, prompts, target, images, overrides)
    if plan_only:
        return {"plan": show_plan(run)}

    with _timed(seconds, "sft"):
        model, sft_log = fine_tune(run)
    with _timed(seconds, "pool"):
        pool = draw_pool(run, model)
    with _timed(seconds, "score"):
        scores = score(run, pool, run.config.scorer)
    with _timed(seconds, "triplets"):
        triplets = rank(run, pool, scores)
    with _timed(seconds, "latents"):
        latents = encode(run, triplets, model)
    with _timed(seconds, "dpo"):
        lora = train(run, model, triplets, latents)

    with _timed(seconds, "evaluation_images"):
        tuned_model = model.with_lora(lora.path, run.config.evaluation.lora_weight)
        target_images = draw_evaluation(run, model, "target")
        tuned_images = draw_evaluation(run, tuned_model, "tuned")
    with _timed(seconds, "evaluation"):
        scorers = run.config.evaluation.scorers
        target_scores = {scorer.name: score(run, target_images, scorer) for scorer in scorers}
        tuned_scores = {scorer.name: score(run, tuned_images, scorer) for scorer in scorers}
        comparison = judge(run, target_images, tuned_images, target_scores, tuned_scores)
        alarms = guard(run, lora, comparison)
    return publish(run, pool, scores, triplets, lora, sft_log, target_images, tuned_images, comparison, alarms, seconds)
