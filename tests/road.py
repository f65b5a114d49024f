"""The whole method without Prefect, as a notebook would call it, on tiny models."""

from pathlib import Path
from typing import Any

from hgdpo_core.evaluate import compare, plan_evaluation
from hgdpo_core.figures.dataset import write_image_folder
from hgdpo_core.run import Run, open_run
from hgdpo_core.stages.distances import distance_folder, enough_shards, measure_distances
from hgdpo_core.stages.image_latents import cache_image_latents, image_latent_folder
from hgdpo_core.stages.latents import cache_latents, latent_folder
from hgdpo_core.stages.pool import generate_pool, plan_pool
from hgdpo_core.stages.scores import score_folder, score_pool
from hgdpo_core.stages.triplets import build_triplets, triplet_folder
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.tune import find_tuned_target, tune_lora, tune_target


def tiny_parameters(place: Path, target: Path, judge: Path) -> dict[str, Any]:
    """What `open_run` takes, but for the root: 6 prompts of 3 candidates in 2 shards, 8 held-out prompts, 4 images."""
    (place / "prompts.txt").write_text("".join(f"a woman in a red top, number {i}\n" for i in range(6)))
    (place / "held-out.txt").write_text("".join(f"a man in a blue top, number {i}\n" for i in range(8)))
    write_image_folder(place / "images", 4, seed=0)
    scorer = {"name": "pickscore", "source": str(judge)}
    return {
        "target": str(target), "prompts": str(place / "prompts.txt"), "images": str(place / "images"),
        "overrides": {
            "target.dtype": "float32", "scorer.source": str(judge), "evaluation.scorers": [scorer],
            "evaluation.prompts": {"source": str(place / "held-out.txt")}, "sampler.width": 32, "sampler.height": 32,
            "sampler.steps": 2, "pool.images_per_prompt": 3, "pool.prompts_per_shard": 4, "sft.max_steps": 2,
            "sft.batch_size": 2, "sft.flip": True, "dpo.max_steps": 2, "dpo.batch_size": 2, "dpo.learning_rate": 5e-2,
            "dpo.flip": True}}


def walk_road(root: str, parameters: dict[str, Any]) -> Run:
    """Every stage of `flows/full.py` up to the comparison."""
    run = open_run(root=root, **parameters)
    store, config = run.store, run.config
    size, model = (config.sampler.width, config.sampler.height), run.target
    if run.images is not None:
        image_latents = image_latent_folder(store, run.images, model, size, flips=config.sft.flip)
        cache_image_latents(run.images, image_latents, model)
        model = find_tuned_target(model, tune_target(store, model, image_latents, config.sft))
    pool = plan_pool(store, model, config.sampler, config.pool, run.prompts.prompts)
    generate_pool(pool)
    scores = score_folder(store, pool.pool_id, config.scorer)
    score_pool(store, pool.folder, scores, config.scorer, pool.indices)
    triplets = triplet_folder(store, pool.folder, scores, run.prompts.id, config.triplets)
    build_triplets(pool.folder, scores, triplets, run.prompts.prompts, pool.indices, config.triplets)
    latents = latent_folder(store, triplets, model, size, flips=config.dpo.flip)
    cache_latents(triplets, latents, model, pool.indices)
    lora = tune_lora(store, model, triplets, latents, pool.indices, config.dpo)
    distances, measured = distance_folder(pool.folder, scores, model), enough_shards(pool)
    measure_distances(pool.folder, scores, distances, model, measured)
    images, judged = [], []
    for generator in (model, model.with_lora(lora.path, config.evaluation.lora_weight)):
        plan = plan_evaluation(store, generator, config.sampler, config.pool, config.evaluation,
                               run.evaluation_prompts.prompts)
        generate_pool(plan)
        folder = score_folder(store, plan.pool_id, config.evaluation.scorers[0])
        score_pool(store, plan.folder, folder, config.evaluation.scorers[0], plan.indices)
        images.append(plan)
        judged.append({config.evaluation.scorers[0].name: folder})
    compare(store, *images, *judged, run.evaluation_prompts.prompts, config.evaluation)
    return run


def decoded_rows(root: str) -> dict[str, list[dict]]:
    """Folder -> all its rows, of every folder of shards below the root."""
    store, rows = Store(root), {}
    for key, _, _ in store.walk():
        folder, _, name = key.rpartition("/")
        if name == "config.json" and folder.split("/")[0] in ("pools", "scores", "triplets", "latents"):
            shards = ShardFolder.open(store, folder)
            rows[folder] = [row for index in shards.manifests() for row in shards.read(index).to_pylist()]
    return rows
