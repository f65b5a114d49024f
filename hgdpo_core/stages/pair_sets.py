"""Pairs that others labelled, as a data set of triplets: checked, scaled alike, the winner first.

Both images of a pair are mirrored together or not at all, which a training with `flip` does later. (Public scripts that
mirror each by itself compare other images than people saw.)
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from hgdpo_core.config.base import content_hash
from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.errors import InputError
from hgdpo_core.images import decode_image, encode_image, fit_image
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.pair_sets import PairSet, open_pair_set
from hgdpo_core.pair_sets.rows import MINOR, NO_IMAGE, SAME_IMAGES, TOO_SMALL, UNDECODABLE, PairText, find_reason
from hgdpo_core.pair_sets.sets import PairReader
from hgdpo_core.pair_sets.tables import Images
from hgdpo_core.pair_sets.words import load_words
from hgdpo_core.parallel import thread_map
from hgdpo_core.prompts import prompt_id
from hgdpo_core.stages.base import Advance, Computer, ShardRows, Stage, Worker, shards_like
from hgdpo_core.stages.dataset_card import PairFacts, render_pair_card
from hgdpo_core.stages.image_latents import SMALLEST_SCALE
from hgdpo_core.stages.triplets import SCHEMA, TRIPLET_BYTES
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder, ShardManifest

PAIRS_AT_A_TIME = 16
FEW = 16
"""Of fewer pairs all labels are alike by chance."""
REJECTED_SCHEMA = pa.schema([("name", pa.string()), ("prompt_id", pa.string()), ("prompt", pa.string()),
                             ("reason", pa.string()), ("detail", pa.string())])


@dataclass(frozen=True)
class PairCounts:
    """What became of the rows that were read; `read` is the sum of the others."""

    read: int
    triplets: int
    reasons: dict[str, int]
    """Why the others are not used, most frequent first."""
    first_won: int = 0
    """Triplets whose winner is the first image of its pair in the source."""

    @property
    def rejected(self) -> int:
        return self.read - self.triplets

    @property
    def warning(self) -> str:
        """What labels that are all alike may hide; "" where they differ, or are few."""
        if self.triplets < FEW or self.first_won not in (0, self.triplets):
            return ""
        return (f"the {'first' if self.first_won else 'second'} image wins in all {self.triplets} pairs: right where a "
                "data set has its winners sorted so, but labels that are all alike say nothing: look at some pairs")


def pair_set_folder(store: Store, pairs: PairSet, size: tuple[int, int]) -> ShardFolder:
    """The folder of the triplets that a data set's pairs become; size is (width, height) in pixels."""
    settings = {"stage": PairSetStage.name, "data_set": pairs.name, "revision": pairs.revision, "format": pairs.format,
                "filter_version": load_words().version, "width": size[0], "height": size[1],
                **pairs.source.identity()}
    name = re.sub(r"[^a-z0-9]+", "-", pairs.name.rpartition("/")[2].lower()).strip("-")[:40] or "pairs"
    return ShardFolder.create(store, f"triplets/{name}-{content_hash(settings)}", settings)


@dataclass(frozen=True)
class PairSetStage(Stage):
    """Pairs of a public or own data set as triplets; what is not used is rejected with its reason.

    A shard is a fixed range of the rows that are read.
    """

    name, unit, doing = "pair_sets", "pairs", "reading pairs"
    runs_on_workers = False  # the files may be on this machine alone, and HPD v2's are unpacked here

    pairs: PairSet
    folder: ShardFolder
    title: str = "pairs"
    requested: tuple[int, ...] | None = None
    """None for all shards that the rows fill."""

    @classmethod
    def of(cls, store: Store, pairs: PairSet, size: tuple[int, int]) -> Self:
        """The triplets of an opened data set; `size`, (width, height), where its source names none."""
        return cls(pairs, pair_set_folder(store, pairs, pairs.source.size or size))

    @property
    def indices(self) -> list[int]:
        return list(self.pairs.shards) if self.requested is None else list(self.requested)

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) of all images in pixels."""
        return self.folder.config["width"], self.folder.config["height"]

    @property
    def fingerprint(self) -> str:
        """In place of a model's, in every row."""
        return f"foreign:{self.pairs.name}@{self.pairs.revision}"

    def units(self, indices: Iterable[int], sources: Sequence[Mapping[int, ShardManifest]]) -> dict[int, int]:
        return {index: len(self.pairs.shard(index)) for index in indices}

    def recipe(self, *, copy_to_store: bool = False) -> dict[str, Any]:
        return {"pairs": self.pairs.source.model_dump(mode="json")}

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        source = PairSource.model_validate(recipe["pairs"])
        if "/" in folder.config["data_set"]:  # a branch of the hub may have moved on
            source = source.model_copy(update={"revision": folder.config["revision"]})
        pairs = open_pair_set(source, leave_out=folder.store.local_path(""))
        if pairs.revision != folder.config["revision"]:
            raise InputError(f"pairs: {source.source} is of the revision {pairs.revision}, {folder.key} was planned "
                             f"with {folder.config['revision']}: start the run that planned it again")
        return cls(pairs, folder, requested=tuple(indices))

    @contextmanager
    def load(self, worker: Worker) -> Iterator[Computer]:
        with self.pairs.reader(lambda text: not self.reason(text), lambda: worker.check_stop(self.doing)) as reader:
            yield _Reading(self, reader)

    def reason(self, text: PairText) -> str:
        """Why a row is not used, by its texts; "" where they allow it."""
        return find_reason(text, self.pairs.source, load_words())

    @property
    def images_per_shard(self) -> int:
        return 2 * self.pairs.source.rows_per_shard

    @property
    def images_per_unit(self) -> int:
        return 2

    def comparable(self) -> Iterator[ShardManifest]:
        return shards_like(self.folder.store, "triplets", stage=self.name)

    def unit_bytes(self, size: ModelSize, image_bytes: float) -> float:
        return 2 * image_bytes + TRIPLET_BYTES

    def counts(self, made: Mapping[int, ShardManifest] | None = None) -> PairCounts:
        """What became of the rows of the shards that exist (`made`, if the caller has looked already)."""
        manifests = (self.existing() if made is None else made).values()
        reasons: Counter[str] = Counter()
        for manifest in manifests:
            reasons.update(manifest.details["reasons"])
        return PairCounts(sum(manifest.details["read"] for manifest in manifests),
                          sum(manifest.rows for manifest in manifests), dict(reasons.most_common()),
                          sum(manifest.details["first_won"] for manifest in manifests))

    def refuse_if_empty(self) -> None:
        """InputError when all shards exist and hold no pair."""
        made = self.existing()
        counts = self.counts(made)
        if len(made) == len(self.indices) and not counts.triplets:
            reasons = "; ".join(f"{reason}: {count}" for reason, count in list(counts.reasons.items())[:4])
            raise InputError(f"pairs: none of the {counts.read} pairs of {self.pairs.name} can be used ({reasons}); "
                             f"they are listed in {self.folder.store.url(self.folder.key)}/rejected")


class _Refused(NamedTuple):
    reason: str
    detail: str = ""


Outcome = tuple[PairText, tuple[bytes, bytes] | _Refused]
"""A row, and its winner and loser as encoded images, or why there are none."""


@dataclass
class _Reading(Computer):
    """Reads pairs and scales their images."""

    stage: PairSetStage
    reader: PairReader
    batch_size: int | None = None

    def batches(self, index: int, tables: Sequence[pa.Table]) -> Iterator[list[Outcome]]:
        """Those that are refused by their texts, then the others, whose images are opened only now."""
        stage = self.stage
        rows = stage.pairs.shard(index)
        refused, used = list[Outcome](), dict[int, PairText]()
        for row, text in zip(rows, self.reader.texts(rows), strict=True):
            if reason := stage.reason(text):
                refused.append((text, _Refused(reason, text.problem)))
            else:
                used[row] = text
        yield refused
        fit = partial(_fit_pair, stage.image_size, stage.pairs.source.image_format)
        images = zip(used.values(), self.reader.images(list(used)), strict=True)
        batch = list[Outcome]()
        for text, outcome in zip(used.values(), thread_map(fit, images), strict=True):
            batch.append((text, outcome))
            if len(batch) == PAIRS_AT_A_TIME:
                yield batch
                batch = []
        yield batch

    def compute(self, index: int, tables: Sequence[pa.Table], batches: Iterator[Any], worker: Worker,
                advance: Advance) -> ShardRows:
        rows, rejected, reasons, read = list[dict[str, Any]](), list[dict[str, Any]](), Counter[str](), 0
        for batch in batches:
            for text, outcome in batch:
                if isinstance(outcome, _Refused):
                    reasons[outcome.reason] += 1
                    rejected.append(_rejected(text, outcome))
                else:
                    rows.append(_row(self.stage.fingerprint, text, outcome))
            read += len(batch)
            advance(len(batch))
        return ShardRows(pa.Table.from_pylist(rows, schema=SCHEMA),
                         pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA),
                         {"read": read, "rejected": len(rejected), "reasons": dict(reasons),
                          "first_won": sum(row["winner_index"] == 0 for row in rows)})


def _fit_pair(size: tuple[int, int], image_format: Any,
              pair: tuple[PairText, Images]) -> tuple[bytes, bytes] | _Refused:
    """Winner and loser, each covering `size` with its middle cut out, or why the pair is not used."""
    text, images = pair
    first, second = images
    for image in images:
        if isinstance(image, str):
            return _Refused(NO_IMAGE, image)
    if first == second:
        return _Refused(SAME_IMAGES, "both are the same bytes")
    fitted = list[bytes]()
    for data in (images if text.winner == 0 else (second, first)):
        assert isinstance(data, bytes)
        try:
            image = decode_image(data)
        except InputError as error:
            return _Refused(UNDECODABLE, str(error))
        if min(image.width / size[0], image.height / size[1]) < SMALLEST_SCALE:
            return _Refused(TOO_SMALL, f"{image.width}x{image.height} pixels for {size[0]}x{size[1]}")
        fitted.append(encode_image(np.asarray(fit_image(image, *size)), image_format))
    winner, loser = fitted
    return winner, loser


def _row(fingerprint: str, text: PairText, images: tuple[bytes, bytes]) -> dict[str, Any]:
    """A row of SCHEMA. `winner_index` is the winner's number in its source; there are no scores, seeds and pool."""
    winner, prompt = text.winner, text.prompt or ""
    loser = 1 - winner
    return {
        "jpg_0": images[0], "jpg_1": images[1], "label_0": 1.0, "label_1": 0.0, "caption": prompt,
        "best_image_uid": text.uids[winner], "image_0_uid": text.uids[winner], "image_1_uid": text.uids[loser],
        "model_0": text.models[winner], "model_1": text.models[loser], "has_label": True, "are_different": True,
        "prompt_id": prompt_id(prompt), "winner_index": winner, "loser_index": loser, "pool_size": 2, "loser_rank": 2,
        "model_fingerprint": fingerprint,
    }


def _rejected(text: PairText, refused: _Refused) -> dict[str, Any]:
    """A row of REJECTED_SCHEMA. The prompts that safety drops without a switch are not copied."""
    prompt = None if refused.reason == MINOR else text.prompt
    return {"name": text.name, "prompt_id": prompt and prompt_id(prompt), "prompt": prompt, "reason": refused.reason,
            "detail": refused.detail}


def write_pair_card(stage: PairSetStage) -> None:
    """Write the card (README.md) beside the shards, once all of them exist."""
    made = stage.existing()
    if len(made) != len(stage.indices):
        return
    pairs, counts = stage.pairs, stage.counts(made)
    facts = PairFacts(pairs.name, pairs.on_hub, pairs.revision, pairs.licence, counts.read,
                      counts.reasons, pairs.skipped, counts.warning)
    key, store = f"{stage.folder.key}/README.md", stage.folder.store
    card = render_pair_card(stage.folder, [made[index] for index in sorted(made)], facts, rows=counts.triplets,
                            schema=SCHEMA).encode()
    if store.read_many([key]).get(key) != card:
        store.write_bytes(key, card)
