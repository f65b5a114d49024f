"""Rank the pools, keep best and worst as triplets, cache what training reads."""

from dataclasses import dataclass

import numpy as np
from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core.execution.jobs import offer_distances, offer_latents
from hgdpo_core.execution.runner import IN_PROCESS, Runner
from hgdpo_core.models import Model
from hgdpo_core.run import Run
from hgdpo_core.stages.distances import distance_folder, enough_shards, read_distances
from hgdpo_core.stages.latents import latent_folder
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.stages.triplets import TripletCounts, build_triplets, dataset_card, triplet_folder
from hgdpo_core.storage.shards import ShardFolder
from tasks.options import STAGE
from tasks.ui import show_table, stage_progress


@dataclass(frozen=True)
class Triplets:
    """A data set of triplets and the pool shards it is made of."""

    folder: ShardFolder
    indices: list[int]
    counts: TripletCounts


@task(name="triplets", **STAGE)
def rank(run: Run, pool: PoolPlan, scores: ShardFolder) -> Triplets:
    """Best and worst of every pool as Parquet, with a data set card."""
    prompts_id, config = run.prompts.id, run.config.triplets
    folder = triplet_folder(run.store, pool.folder, scores, prompts_id, config)
    with stage_progress("triplets") as progress:
        counts = build_triplets(pool.folder, scores, folder, run.prompts.prompts, pool.indices, config,
                                progress=progress)
    card = dataset_card(folder, pool.indices, counts, licence=run.config.licence)
    run.store.write_bytes(f"{folder.key}/README.md", card.encode())
    get_run_logger().info("Triplets: %d, and %d pools without a pair, in %s", counts.triplets, counts.rejected,
                          folder.key)
    show_table("triplets", [{"triplets": counts.triplets, "rejected": counts.rejected, "folder": folder.key}],
               "Best and worst of each pool")
    return Triplets(folder, pool.indices, counts)


@task(name="latent distances", **STAGE)
def measure_latents(run: Run, pool: PoolPlan, scores: ShardFolder, model: Model,
                    runner: Runner = IN_PROCESS) -> np.ndarray:
    """How far the channel statistics of worse images are from the best one's, in some pools (paper Figure 5b)."""
    folder, indices = distance_folder(pool.folder, scores, model), enough_shards(pool)
    runner.make([offer_distances(pool.folder, scores, folder, model, indices, share=runner.share)], stage_progress)
    distances = read_distances(folder, indices, pool.pool.images_per_prompt)
    get_run_logger().info("Latent distances: measured in %d pools, in %s", len(distances), folder.key)
    return distances


@task(name="latents", **STAGE)
def encode(run: Run, triplets: Triplets, model: Model, runner: Runner = IN_PROCESS) -> ShardFolder:
    """Latents of the triplets' images and the prompts' text embeddings."""
    size = (run.config.sampler.width, run.config.sampler.height)
    folder = latent_folder(run.store, triplets.folder, model, size, flips=run.config.dpo.flip)
    work = offer_latents(triplets.folder, folder, model, triplets.indices, share=runner.share)
    runner.make([work], stage_progress)
    get_run_logger().info("Latents: %d shards encoded now, in %s", len(work.missing), folder.key)
    return folder
