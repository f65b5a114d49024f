"""Identity distances of a personalised pool: how far each image's face is from its concept's, by one judge."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from hgdpo_core.config import JudgeConfig
from hgdpo_core.config.base import content_hash
from hgdpo_core.images import decode_image
from hgdpo_core.models.locations import Location, refuse_other_model
from hgdpo_core.prompts import concept_of, prompt_id
from hgdpo_core.prompts.concepts import load_concept
from hgdpo_core.scorers.identity import IdentityJudge, embed_concept, find_judge, load_judge, locate_judge
from hgdpo_core.stages.base import Advance, Computer, ShardRows, Stage, Worker, prepare_batches
from hgdpo_core.stages.pool import CONCEPT, PoolPlan, images_kept
from hgdpo_core.stages.pool import SCHEMA as POOL_SCHEMA
from hgdpo_core.statistics.identity import Distances
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

SCHEMA = pa.schema([("prompt_id", pa.string()), ("index", pa.int32()), ("distance", pa.float32()),
                    ("faces", pa.int32())])
"""No distance where the judge finds no face."""


@dataclass(frozen=True)
class IdentityStage(Stage):
    """Distances of a pool's images by one judge, one shard for each shard of images."""

    name, doing = "identities", "comparing faces"
    reads, row_bytes, read_schemas = ("pool",), 12.0, (POOL_SCHEMA.append(CONCEPT),)

    pool: ShardFolder
    folder: ShardFolder
    judge: JudgeConfig
    detector: Path | None
    """Weights of the face detector, for judges that need one."""
    requested: tuple[int, ...]
    title: str
    prompts: Mapping[int, tuple[str, ...]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, plan: PoolPlan, judge: JudgeConfig, detector: Path | None, *, title: str) -> Self:
        """The distances of a planned pool whose samples have concepts."""
        settings = {"stage": cls.name, "pool_id": plan.pool_id, "judge": judge.name,
                    "fingerprint": find_judge(judge, detector)}
        key = f"identities/{plan.pool_id}/{judge.name}-{content_hash(settings)}"
        return cls(plan.folder, ShardFolder.create(plan.folder.store, key, settings), judge, detector,
                   tuple(plan.indices), title, {shard.index: shard.prompts for shard in plan.shards})

    @property
    def expected(self) -> Mapping[int, int]:
        images = images_kept(self.pool)
        return {index: images * len(prompts) for index, prompts in self.prompts.items()}

    def recipe(self, *, copy_to_store: bool = False) -> dict[str, Any]:
        def locate(path: Path | None) -> dict[str, Any] | None:
            return Location.of(self.folder.store, path, copy_to_store=copy_to_store).model_dump() if path else None

        return {"judge": self.judge.model_dump(mode="json"), "place": locate(locate_judge(self.judge)),
                "detector": locate(self.detector)}

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        source, detector = (recipe[name] and Location.model_validate(recipe[name]).locate(folder.store)
                            for name in ("place", "detector"))
        judge = JudgeConfig.model_validate({**recipe["judge"], "source": source})
        weights = Path(detector) if detector else None
        refuse_other_model(f"judge {judge.name}", find_judge(judge, weights), folder.config["fingerprint"])
        pool = ShardFolder.open(folder.store, f"pools/{folder.config['pool_id']}")
        return cls(pool, folder, judge, weights, tuple(indices), judge.name)

    def load(self, worker: Worker) -> AbstractContextManager[Computer]:
        judge: IdentityJudge = worker.network or load_judge(self.judge, self.detector)
        return nullcontext(_Judging(judge, self.folder.store, self.judge.batch_size))

    def first_prompts(self, index: int) -> Sequence[str]:
        return self.prompts.get(index, ())

    @property
    def work(self) -> str:
        return f"identity by {self.judge.name}"


@dataclass
class _Judging(Computer):
    """A judge that compares each image with its concept; faces are found and cut in threads, beside the network."""

    judge: IdentityJudge
    store: Store
    batch_size: int | None
    concepts: dict[str, np.ndarray] = field(default_factory=dict)
    """Embeddings by the concept's id."""

    def batches(self, index: int, tables: Sequence[pa.Table]) -> Iterator[list[Any]]:
        return prepare_batches(lambda data: self.judge.cut(decode_image(data.as_py())), tables[0]["image"],
                               self.batch_size)

    def compute(self, index: int, tables: Sequence[pa.Table], batches: Iterator[Any], worker: Worker,
                advance: Advance) -> ShardRows:
        (images,), distances, faces = tables, list[float | None](), list[int]()
        concepts = images[CONCEPT.name].to_pylist()
        for cuts in batches:
            found = [cut.face for cut in cuts if cut.face is not None]
            embeddings = iter(self.judge.embed(found) if found else ())
            for cut, concept in zip(cuts, concepts[len(faces):len(faces) + len(cuts)], strict=True):
                similarity = None if cut.face is None else float(next(embeddings) @ self._concept(concept))
                distances.append(None if similarity is None else 1 - similarity)
                faces.append(cut.faces)
            advance(len(cuts))
        return ShardRows(pa.table([images["prompt_id"], images["index"], distances, faces], schema=SCHEMA))

    def _concept(self, concept_id: str) -> np.ndarray:
        if concept_id not in self.concepts:
            concept = load_concept(self.store, concept_id)
            self.concepts[concept_id] = embed_concept(self.judge, concept.pictures(), concept.name)
        return self.concepts[concept_id]


def read_distances(folder: ShardFolder, plan: PoolPlan, samples: Sequence[str]) -> Distances:
    """Of all images of the samples: row i is `samples[i]`, column j the image of index j."""
    rows = {prompt_id(sample): row for row, sample in enumerate(samples)}
    shape = len(samples), plan.pool.images_per_prompt
    distance, faces = np.full(shape, np.nan), np.zeros(shape, dtype=int)
    for index in plan.indices:
        for row in folder.read(index, schema=SCHEMA).to_pylist():
            if row["prompt_id"] in rows:
                at = rows[row["prompt_id"]], row["index"]
                distance[at] = np.nan if row["distance"] is None else row["distance"]
                faces[at] = row["faces"]
    return Distances(distance, faces)


def people_of(samples: Sequence[str]) -> list[str]:
    """The id of each sample's concept."""
    return [concept_of(sample) or "" for sample in samples]
