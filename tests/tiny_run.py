"""The whole method without Prefect, as a notebook would call it, on tiny models."""

from pathlib import Path
from typing import Any

from hgdpo_core.figures.dataset import write_image_folder
from hgdpo_core.pipeline import run_all
from hgdpo_core.run import Run, open_run
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder


def tiny_parameters(location: Path, target: Path, judge: Path) -> dict[str, Any]:
    """What `open_run` takes, but for the root: 6 prompts of 3 candidates in 2 shards, 8 held-out prompts, 4 images."""
    (location / "prompts.txt").write_text("".join(f"a woman in a red top, number {i}\n" for i in range(6)))
    (location / "held-out.txt").write_text("".join(f"a man in a blue top, number {i}\n" for i in range(8)))
    write_image_folder(location / "images", 4, seed=0)
    scorer = {"name": "pickscore", "source": str(judge)}
    return {
        "target": str(target), "prompts": str(location / "prompts.txt"), "images": str(location / "images"),
        "overrides": {
            "target.dtype": "float32", "scorer.source": str(judge), "evaluation.scorers": [scorer],
            "evaluation.prompts": {"source": str(location / "held-out.txt")}, "sampler.width": 32, "sampler.height": 32,
            "sampler.steps": 2, "pool.images_per_prompt": 3, "pool.prompts_per_shard": 4, "sft.max_steps": 2,
            "sft.batch_size": 2, "sft.flip": True, "dpo.max_steps": 2, "dpo.batch_size": 2, "dpo.learning_rate": 5e-2,
            "dpo.flip": True}}


def run_tiny(root: str, parameters: dict[str, Any]) -> Run:
    """The whole method up to the comparison, without a report."""
    run = open_run(root=root, **parameters)
    run_all(run)
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
