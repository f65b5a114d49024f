"""The work pools of the deployments, without Prefect."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pool:
    """A work pool of the deployments."""

    name: str
    limit: int | None
    """Runs at once over all workers; None: as many as there are workers."""
    description: str


PARENTS = Pool("hgdpo-cpu", None, "Whole runs: they start the work of the other pools and wait for it")
SHARDS = Pool("hgdpo-gpu", None, "Shards: images, scores and latents, one run per GPU at a time")
TRAININGS = Pool("hgdpo-train", 1, "Trainings: SFT and DPO, one at a time on all GPUs of a machine")
POOLS = (PARENTS, SHARDS, TRAININGS)
