"""Where a study's pairs come from: two models of an evaluation, or winners and losers of a data set of triplets."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from hgdpo_core.errors import InputError
from hgdpo_core.progress import count_of
from hgdpo_core.prompts import as_sample, prompt_id
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

NO_IMAGE = "a model has no image of the prompt"
NO_PROMPT = "the prompt is empty"
OTHER_SEED = "the seeds of the two images differ"
NOT_WINNER = "the first image is not labelled the winner"
KINDS = ("runs", "evaluations", "triplets")


@dataclass(frozen=True)
class Candidate:
    """Two images of one prompt, as they are stored."""

    prompt_id: str
    prompt: str
    first: str
    second: str
    """Names of the models."""
    images: tuple[bytes, bytes]
    scores: tuple[dict[str, float], dict[str, float]]


class PairsOfSource(Protocol):
    """The pairs of one source, by keys that cost nothing to list."""

    def keys(self) -> list[Any]:
        """A key for each pair that the source may have."""
        ...

    def read(self, keys: Sequence[Any]) -> Iterator[Candidate | str]:
        """The pair of each key, or the reason why there is none, in any order."""
        ...


def resolve_source(store: Store, name: str) -> str:
    """The key of an evaluation or of triplets, from it, from an id, or from that of a finished run."""
    kind, _, found = name.strip("/").rpartition("/")
    kinds = [kind] if kind else [kind for kind in KINDS if store.exists(f"{kind}/{found}/config.json")]
    if len(kinds) != 1 or kinds[0] not in KINDS or not store.exists(f"{kinds[0]}/{found}/config.json"):
        there = {kind: store.list_folders(kind) for kind in KINDS}
        listed = "; ".join(f"{kind}: {', '.join(ids)}" for kind, ids in there.items() if ids) or "nothing of them"
        raise InputError(f"{name} is no run, evaluation or data set of triplets of {store.root}, which has {listed}: "
                         "give one of these ids")
    if kinds[0] != "runs":
        return f"{kinds[0]}/{found}"
    if not store.exists(f"runs/{found}/summary.json"):
        raise InputError(f"the run {found} in {store.root} is not finished, it has no summary.json: start it again to "
                         "finish it, then make the study")
    return "evaluations/" + store.read_object(f"runs/{found}/summary.json", evaluation_id=str)["evaluation_id"]


def open_sources(store: Store, keys: Sequence[str]) -> list[PairsOfSource]:
    """The sources of a study. The same images have the same model's name in all of them."""
    evaluations = {key: store.read_object(f"{key}/config.json", target=str, tuned=str, prompts=list[str],
                                          scores=dict[str, list[str]])
                   for key in keys if key.startswith("evaluations/")}
    names = _name_models(evaluations)
    return [EvaluationPairs(store, key, evaluations[key], names) if key in evaluations else TripletPairs(store, key)
            for key in keys]


def _name_models(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Pool -> name: "target" and "tuned"; where several pools play one of these parts, with the evaluation's id."""
    names: dict[str, str] = {}
    for part in ("target", "tuned"):
        pools: dict[str, str] = {}
        for key, config in evaluations.items():
            pools.setdefault(config[part], key)
        for pool, key in pools.items():
            names.setdefault(pool, part if len(pools) == 1 else f"{part} of {key.split('/')[-1]}")
    return names


@dataclass(frozen=True)
class EvaluationPairs:
    """The first image of each prompt by both models of an evaluation."""

    store: Store
    key: str
    config: Mapping[str, Any]
    names: Mapping[str, str]
    """Pool -> name of its model."""

    def keys(self) -> list[str]:
        """The prompts, of a personalised comparison each with its person."""
        prompts = self.config["prompts"]
        nothing = [None] * len(prompts)
        return list(map(as_sample, prompts, *(self.config.get(name, nothing) for name in ("concepts", "captions"))))

    def read(self, keys: Sequence[str]) -> Iterator[Candidate | str]:
        """The prompts' pairs."""
        pools = [self.config["target"], self.config["tuned"]]
        scores = [{name: folders[side] for name, folders in self.config["scores"].items()} for side in (0, 1)]
        ids = {prompt_id(prompt) for prompt in keys}
        images = [read_first_images(self.store, pool, by_scorer, ids)
                  for pool, by_scorer in zip(pools, scores, strict=True)]
        for prompt in keys:
            yield self._pair(prompt, *(side.get(prompt_id(prompt)) for side in images))

    def _pair(self, prompt: str, first: dict[str, Any] | None, second: dict[str, Any] | None) -> Candidate | str:
        if not prompt.strip():
            return NO_PROMPT
        if first is None or second is None:
            return NO_IMAGE
        if first["seed"] != second["seed"]:
            return OTHER_SEED
        return Candidate(prompt_id(prompt), str(prompt), self.names[self.config["target"]],
                         self.names[self.config["tuned"]], (first["image"], second["image"]),
                         (first["scores"], second["scores"]))


def read_first_images(store: Store, pool: str, scores: Mapping[str, str], ids: set[str]) -> dict[str, dict[str, Any]]:
    """Prompt id -> seed, bytes and scores of a pool's image of index 0, for some prompts; `scores`: name -> folder."""
    folder = ShardFolder.open(store, pool)
    rows: dict[str, dict[str, Any]] = {}
    for index, manifest in folder.manifests().items():
        held = manifest.details.get("prompt_ids")
        if held is not None and not ids & set(held):
            continue
        found = {row["prompt_id"]: {**row, "scores": {}}
                 for row in _first_rows(folder.read(index, ["prompt_id", "index", "seed", "image"]), ids)}
        for name, key in scores.items():
            scored = ShardFolder.open(store, key)
            if found and scored.find(index) is not None:
                for row in _first_rows(scored.read(index, ["prompt_id", "index", "score"]), found.keys()):
                    found[row["prompt_id"]]["scores"][name] = row["score"]
        rows |= found
    return rows


def _first_rows(table: pa.Table, ids: Any) -> list[dict[str, Any]]:
    chosen = [i for i, (key, index) in enumerate(zip(table["prompt_id"].to_pylist(), table["index"].to_pylist(),
                                                     strict=True)) if index == 0 and key in ids]
    return table.take(chosen).to_pylist()


@dataclass(frozen=True)
class TripletPairs:
    """Winners and losers: do people agree with the scorer that chose them? (paper Figure 5a)"""

    store: Store
    key: str

    def keys(self) -> list[tuple[int, int]]:
        """Shard and row of each triplet."""
        if not self.store.exists(f"{self.key}/README.md"):
            raise InputError(f"{self.key} in {self.store.root} is not finished, it has no README.md: start its run "
                             "again, then make the study")
        manifests = ShardFolder.open(self.store, self.key).manifests()
        return [(index, row) for index, manifest in manifests.items() for row in range(manifest.rows)]

    def read(self, keys: Sequence[tuple[int, int]]) -> Iterator[Candidate | str]:
        """The triplets of some shards and rows."""
        folder, by_shard = ShardFolder.open(self.store, self.key), defaultdict[int, list[int]](list)
        scorer = self._scorer(folder)
        for index, row in keys:
            by_shard[index].append(row)
        columns = ["jpg_0", "jpg_1", "label_0", "caption", "prompt_id", "winner_score", "loser_score"]
        for index, rows in sorted(by_shard.items()):
            yield from (_triplet(row, scorer) for row in folder.read(index, columns).take(rows).to_pylist())

    def _scorer(self, folder: ShardFolder) -> str:
        """The name of the scorer that ranked the pools; of pairs that others labelled there are no scores."""
        key = folder.config.get("scores")
        scores = ShardFolder.open_if_readable(self.store, key) if key else None
        return scores.config["scorer"] if scores else "score"


def _triplet(row: Mapping[str, Any], scorer: str) -> Candidate | str:
    if row["label_0"] != 1:
        return NOT_WINNER
    if not (row["caption"] or "").strip():
        return NO_PROMPT
    scores = [{} if row[name] is None else {scorer: row[name]} for name in ("winner_score", "loser_score")]
    return Candidate(row["prompt_id"], row["caption"], "winner", "loser", (row["jpg_0"], row["jpg_1"]),
                     (scores[0], scores[1]))


def in_random_order(sources: Sequence[PairsOfSource], seed: int) -> list[tuple[int, Any]]:
    """Number of the source and key of all pairs, in turn from each. The same prompts come first in all of them."""
    ordered = [sorted(source.keys(), key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
               for source in sources]
    most = max(map(len, ordered), default=0)
    return [(number, keys[place]) for place in range(most) for number, keys in enumerate(ordered)
            if place < len(keys)]


def describe_refused(refused: Mapping[str, int]) -> str:
    """The reasons why pairs were refused, with their numbers, on one line."""
    return "; ".join(f"{count_of(number, 'pair')}: {reason}" for reason, number in sorted(refused.items())) or "none"
