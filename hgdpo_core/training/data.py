"""What trainers read: batches, the order of samples over a whole run, and cached latents as samples.

Samples are counted over the whole run: the sample at global position k is the same, with the same noise and
timestep, for any number of processes, any split into micro-batches, and after any number of resumes.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch.nn.utils.rnn import pad_sequence

from hgdpo_core.errors import InputError
from hgdpo_core.models import Conditioning
from hgdpo_core.models.backbone import SIZES
from hgdpo_core.stages.latents import MIRRORED
from hgdpo_core.storage.shards import ShardFolder

CACHED_SHARDS = 16  # whose rows are mixed; as many are fetched ahead: both bound memory, whatever the data set's size
FETCHING_THREADS = 8

BatchT_co = TypeVar("BatchT_co", covariant=True)


@dataclass(frozen=True)
class PairBatch:
    """B pairs: scaled latents `[B,C,h,w]` of winners and losers, text embeddings `[B,L,D]`; float32.

    `prompt_mask`, bool `[B,L]`, is True where an embedding is its prompt's own; None where none is padded. The
    mirrored latents are those of the mirrored images; only a training with `flip` reads them. `pooled`, `[B,P]`, are
    pooled embeddings in families that have them.
    """

    winner_latents: torch.Tensor
    loser_latents: torch.Tensor
    prompt_embeds: torch.Tensor
    prompt_mask: torch.Tensor | None = None
    winner_mirrored: torch.Tensor | None = None
    loser_mirrored: torch.Tensor | None = None
    pooled: torch.Tensor | None = None

    @property
    def conditioning(self) -> Conditioning:
        """Of each pair once."""
        return Conditioning(self.prompt_embeds, self.prompt_mask, self.pooled)

    def with_pooled(self, shape: Sequence[int]) -> Self:
        """The same with random pooled embeddings."""
        return replace(self, pooled=torch.randn(len(self.prompt_embeds), *shape))


@dataclass(frozen=True)
class ImageBatch:
    """B captioned images: scaled latents `[B,C,h,w]` and text embeddings `[B,L,D]`; float32.

    `mirrored` are the latents of the mirrored images; only a training with `flip` reads them. `pooled`, `[B,P]`, and
    `sizes`, `[B,6]`, are for families that read them.
    """

    latents: torch.Tensor
    prompt_embeds: torch.Tensor
    mirrored: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    sizes: torch.Tensor | None = None

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning(self.prompt_embeds, pooled=self.pooled,
                            extra={} if self.sizes is None else {SIZES: self.sizes})

    def with_pooled(self, shape: Sequence[int]) -> Self:
        """The same with random pooled embeddings."""
        return replace(self, pooled=torch.randn(len(self.prompt_embeds), *shape))


@dataclass(frozen=True)
class PromptBatch:
    """B prompts with their text embeddings, float32, each [1, L, D] of its own length."""

    prompts: Sequence[str]
    conditionings: Sequence[Conditioning]

    def with_pooled(self, shape: Sequence[int]) -> Self:
        """The same with random pooled embeddings."""
        return replace(self, conditionings=[replace(text, pooled=torch.randn(1, *shape))
                                            for text in self.conditionings])


class SampleSource(Protocol[BatchT_co]):
    """Random access to the samples of a training."""

    def __len__(self) -> int:
        """Samples in one epoch, at least 1."""
        ...

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        """The `len(self)` indices of an epoch in training order; the same for the same arguments.

        `epoch_order` is the plain one; a streaming source shuffles its shards, and inside them.
        """
        ...

    def batch(self, indices: Sequence[int]) -> BatchT_co:
        """The samples of these indices, in this order."""
        ...


def hashed_seed(*parts: int | str) -> int:
    """A seed below 2**63 that is decided by the parts alone."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def epoch_order(samples: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(samples), decided by the arguments alone."""
    generator = torch.Generator().manual_seed(hashed_seed("order", seed, epoch))
    return torch.randperm(samples, generator=generator).tolist()


def sample_generator(seed: int, position: int) -> torch.Generator:
    """The randomness of the sample at global position `position`: a CPU generator seeded by sha256 of both."""
    return torch.Generator().manual_seed(hashed_seed(seed, position))


class DataOrder:
    """Sample indices by global position; epochs follow each other without a gap or a short batch."""

    def __init__(self, source: SampleSource[Any], seed: int):
        self._source, self._seed = source, seed
        self._epoch, self._order = -1, []

    def indices(self, positions: Sequence[int]) -> list[int]:
        return [self._index(*divmod(position, len(self._source))) for position in positions]

    def _index(self, epoch: int, position: int) -> int:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(self._source.order(self._seed, epoch))
            if len(self._order) != len(self._source):
                raise InputError(f"the order of epoch {epoch} names {len(self._order)} samples: expected each "
                                 f"of the {len(self._source)} once")
        return self._order[position]


class ShardCache:
    """The shards used last, and those fetched ahead: at most 2 * CACHED_SHARDS in memory or on their way to it."""

    def __init__(self, read: Callable[[int], pa.Table]):
        self._read, self._held = read, OrderedDict[int, Future[pa.Table]]()
        self._threads = ThreadPoolExecutor(FETCHING_THREADS, "latents")

    def __len__(self) -> int:
        return len(self._held)

    def fetch(self, shards: Iterable[int], *, drop_others: bool = False) -> None:
        """Begin to read those that are not held; an error is raised where one is used."""
        shards = dict.fromkeys(shards)
        if drop_others:
            for shard in self._held.keys() - shards.keys():
                self._held.pop(shard).cancel()
        for shard in shards:
            if shard not in self._held:
                while len(self._held) >= 2 * CACHED_SHARDS:
                    self._held.popitem(last=False)[1].cancel()
                self._held[shard] = self._threads.submit(self._read, shard)

    def __getitem__(self, shard: int) -> pa.Table:
        self.fetch([shard])
        self._held.move_to_end(shard)
        try:
            return self._held[shard].result()
        except Exception:
            del self._held[shard]  # the next use reads it again
            raise


class LatentRows:
    """Random access to rows of latent shards: memory does not grow with the data set.

    While the rows of a group of shards are read in the order of an epoch, the next group's shards are fetched.
    """

    def __init__(self, folder: ShardFolder, indices: Sequence[int]):
        existing = folder.manifests()
        manifests = {index: existing[index] for index in indices if existing[index].rows}
        self.manifests, self.shards = manifests, list(manifests)
        self.starts = np.cumsum([0] + [manifest.rows for manifest in manifests.values()])
        self.flips: bool = folder.config.get("flips", False)
        self.tables = ShardCache(lambda shard: folder.read(shard, manifest=manifests[shard]))
        self._groups: list[list[int]] = []
        """The shards of each group, in the order of the epoch asked for last."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def order(self, seed: int, epoch: int) -> list[int]:
        """A shuffle that reads shards in groups of CACHED_SHARDS: shards are permuted, then rows within a group."""
        shards = epoch_order(len(self.shards), seed, epoch)
        self._groups, rows = [], list[int]()
        for start in range(0, len(shards), CACHED_SHARDS):
            self._groups.append([self.shards[shard] for shard in shards[start:start + CACHED_SHARDS]])
            group = [row for shard in shards[start:start + CACHED_SHARDS]
                     for row in range(self.starts[shard], self.starts[shard + 1])]
            rows += [int(group[i]) for i in epoch_order(len(group), seed, epoch * len(shards) + start + 1)]
        return rows

    @contextmanager
    def fetching(self, rows: Sequence[int]) -> Iterator[None]:
        """For the block that reads these rows: their shards are fetched at once, and after it those that come next."""
        self.tables.fetch(self._shard_of(row) for row in rows)
        yield
        last = self._shard_of(rows[-1])  # a batch that reaches into another epoch ends in the one asked for last
        at = next((number for number, group in enumerate(self._groups) if last in group), None)
        if at is not None:
            self.tables.fetch(chain(*self._groups[at:at + 2]), drop_others=True)

    def stack(self, rows: Sequence[int], column: str, shape: str) -> torch.Tensor:
        """float32 [B, ...] of a column, shaped as the shard's manifest records under `shape`."""
        return torch.from_numpy(np.stack([self._value(row, column, shape)[0] for row in rows]))

    def stack_embeds(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings [B, L, D] as long as the longest, and where they hold text, bool [B, L]; None if they all do."""
        embeds = [self._embed(row) for row in rows]
        padded = pad_sequence(embeds, batch_first=True)
        lengths = torch.tensor([len(embed) for embed in embeds])
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        return padded, None if bool(mask.all()) else mask

    def stack_pooled(self, rows: Sequence[int]) -> torch.Tensor | None:
        """Pooled embeddings [B, P]; None in families without."""
        has_pooled = "pooled_shape" in self.manifests[self._shard_of(rows[0])].details
        return self.stack(rows, "pooled_embeds", "pooled_shape") if has_pooled else None

    def stack_sizes(self, rows: Sequence[int]) -> torch.Tensor | None:
        """SIZES [B, 6]; None in families that do not read them."""
        if "sizes" not in self.tables[self._shard_of(rows[0])].column_names:
            return None
        return torch.tensor(np.stack([np.frombuffer(self._cell(row, "sizes"), dtype=np.float32) for row in rows]))

    def _embed(self, row: int) -> torch.Tensor:
        chunks = self._value(row, "prompt_embeds", "embeds_shape")
        return torch.tensor(chunks.reshape(-1, chunks.shape[-1]))

    def _value(self, row: int, column: str, shape: str) -> np.ndarray:
        """float32 [K, ...]: the K items of the manifest's shape that a row holds."""
        details = self.manifests[self._shard_of(row)].details
        return np.frombuffer(self._cell(row, column), dtype=np.float32).reshape(-1, *details[shape])

    def _cell(self, row: int, column: str) -> Any:
        position = self._position_of(row)
        return self.tables[self.shards[position]][column][int(row - self.starts[position])].as_py()

    def _position_of(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def _shard_of(self, row: int) -> int:
        return self.shards[self._position_of(row)]


class LatentPairs(LatentRows):
    """The pairs a DPO trainer reads."""

    def batch(self, indices: Sequence[int]) -> PairBatch:
        with self.fetching(indices):
            embeds, mask = self.stack_embeds(indices)
            winner, loser = (self.stack(indices, side, "latent_shape") for side in ("winner", "loser"))
            mirrored = (None, None)
            if self.flips:
                mirrored = tuple(self.stack(indices, side, "latent_shape") for side in MIRRORED)
            return PairBatch(winner, loser, embeds, mask, *mirrored, pooled=self.stack_pooled(indices))


class Winners(LatentPairs):
    """The winners of pairs, two for each sample: a pair's own, and that of the next one in its shard.

    So an epoch, which has as many samples as there are pairs, has each winner twice.
    """

    def batch(self, indices: Sequence[int]) -> PairBatch:
        return super().batch([row for index in indices for row in (index, self._next(index))])

    def _next(self, row: int) -> int:
        first, end = (int(self.starts[self._position_of(row) + i]) for i in range(2))
        return first + (row + 1 - first) % (end - first)


class EmbeddedPrompts(LatentRows):
    """The prompts that a training samples images for."""

    def batch(self, indices: Sequence[int]) -> PromptBatch:
        with self.fetching(indices):
            pooled = self.stack_pooled(indices)
            texts = [Conditioning(self._embed(row)[None], pooled=None if pooled is None else pooled[[number]])
                     for number, row in enumerate(indices)]
            return PromptBatch([self._cell(row, "prompt") for row in indices], texts)


class LatentImages(LatentRows):
    """The images an SFT trainer reads."""

    def batch(self, indices: Sequence[int]) -> ImageBatch:
        with self.fetching(indices):
            return ImageBatch(latents=self.stack(indices, "latents", "latent_shape"),
                              prompt_embeds=self.stack(indices, "prompt_embeds", "embeds_shape"),
                              mirrored=self.stack(indices, "mirrored", "latent_shape") if self.flips else None,
                              pooled=self.stack_pooled(indices), sizes=self.stack_sizes(indices))
