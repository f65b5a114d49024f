"""Rank the pools, keep best and worst as triplets, or read others' pairs; cache the latents that training reads."""

from prefect.logging import get_run_logger

from hgdpo_core import pipeline
from hgdpo_core.execution.runner import Runner
from hgdpo_core.models import Model
from hgdpo_core.progress import StageProgress
from hgdpo_core.run import Run
from hgdpo_core.stages.distances import DistanceStage
from hgdpo_core.stages.latents import LatentStage
from hgdpo_core.stages.pair_sets import PairSetStage
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.stages.prompt_embeds import PromptEmbedStage
from hgdpo_core.stages.triplets import TripletStage
from hgdpo_core.storage.shards import ShardFolder
from tasks.assets import show_asset
from tasks.options import stage_task
from tasks.ui import show_table


@stage_task("triplets")
def make_triplets(run: Run, pool: PoolPlan, scores: ShardFolder, runner: Runner, on: StageProgress) -> TripletStage:
    """Best and worst of every pool as Parquet, with a data set card."""
    triplets = pipeline.make_triplets(run, pool, scores, runner, on)
    counts, folder = triplets.counts(), triplets.folder.key
    get_run_logger().info("Triplets: %d; pools without a pair: %d; in %s", counts.triplets, counts.rejected, folder)
    show_table("triplets", [{"triplets": counts.triplets, "rejected": counts.rejected, "folder": folder}],
               "Best and worst of each pool")
    show_asset(run.store, folder, "triplets", [pool.folder.key, scores.key], triplets=counts.triplets,
               rejected=counts.rejected)
    return triplets


@stage_task("pairs")
def read_pairs(run: Run, runner: Runner, on: StageProgress) -> PairSetStage:
    """Pairs that others labelled as triplets, with a data set card."""
    pairs = pipeline.read_pairs(run, runner, on)
    counts, folder = pairs.counts(), pairs.folder.key
    get_run_logger().info("Foreign pairs of %s: %d read, %d used, %d not; in %s", pairs.pairs.name, counts.read,
                          counts.triplets, counts.rejected, folder)
    if counts.warning:
        get_run_logger().warning("Foreign pairs of %s: %s", pairs.pairs.name, counts.warning)
    rows = [{"pairs": "used", "number": counts.triplets},
            *({"pairs": reason, "number": number} for reason, number in counts.reasons.items())]
    show_table("foreign-pairs", rows, f"Foreign pairs of {pairs.pairs.name}: {counts.read} read")
    show_asset(run.store, folder, "triplets", triplets=counts.triplets, rejected=counts.rejected, read=counts.read)
    return pairs


@stage_task("latents")
def encode_triplets(run: Run, triplets: TripletStage | PairSetStage, model: Model, runner: Runner,
                    on: StageProgress) -> LatentStage:
    """Latents of the triplets' images and the prompts' text embeddings."""
    latents = pipeline.encode_triplets(run, triplets, model, runner, on)
    get_run_logger().info("Latents: %s", latents.folder.key)
    return latents


@stage_task("prompt embeddings")
def embed_prompts(run: Run, model: Model, runner: Runner, on: StageProgress) -> PromptEmbedStage:
    """Text embeddings of the training prompts, where the objective is trained on prompts alone."""
    embeds = pipeline.embed_prompts(run, model, runner, on)
    get_run_logger().info("Prompt embeddings: %s", embeds.folder.key)
    return embeds


@stage_task("latent distances")
def measure_distances(run: Run, pool: PoolPlan, scores: ShardFolder, model: Model, runner: Runner,
                      on: StageProgress) -> DistanceStage:
    """How far the channel statistics of worse images are from the best one's, in some pools (paper Figure 5b)."""
    distances = pipeline.measure_distances(run, pool, scores, model, runner, on)
    get_run_logger().info("Latent distances: %s", distances.folder.key)
    return distances
