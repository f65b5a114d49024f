"""What trainers read: batches, the order of samples over a whole run, and cached latents as samples.

Samples are counted over the whole run: the sample at global position k is the same, with the same noise and
timestep, for any number of processes, any split into micro-batches, and after any number of resumes.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from hgdpo_core.errors import InputError
from hgdpo_core.models import Conditioning
from hgdpo_core.stages.latents import MIRRORED
from hgdpo_core.storage.shards import ShardFolder

CACHED_SHARDS = 16  # bounds the memory of training, whatever the size of the data set

BatchT_co = TypeVar("BatchT_co", covariant=True)


@dataclass(frozen=True)
class PairBatch:
    """B pairs: scaled latents `[B,C,h,w]` of winners and losers, text embeddings `[B,L,D]`; float32.

    `prompt_mask`, bool `[B,L]`, is True where an embedding is its prompt's own; None where none is padded. The
    mirrored latents are those of the mirrored images; only a training with `flip` reads them.
    """

    winner_latents: torch.Tensor
    loser_latents: torch.Tensor
    prompt_embeds: torch.Tensor
    prompt_mask: torch.Tensor | None = None
    winner_mirrored: torch.Tensor | None = None
    loser_mirrored: torch.Tensor | None = None

    @property
    def conditioning(self) -> Conditioning:
        """Of each pair once."""
        return Conditioning(self.prompt_embeds, self.prompt_mask)


@dataclass(frozen=True)
class ImageBatch:
    """B captioned images: scaled latents `[B,C,h,w]` and text embeddings `[B,L,D]`; float32.

    `mirrored` are the latents of the mirrored images; only a training with `flip` reads them.
    """

    latents: torch.Tensor
    prompt_embeds: torch.Tensor
    mirrored: torch.Tensor | None = None

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning(self.prompt_embeds)


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


def _hashed_seed(*parts: int | str) -> int:
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def epoch_order(samples: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(samples), decided by the arguments alone."""
    generator = torch.Generator().manual_seed(_hashed_seed("order", seed, epoch))
    return torch.randperm(samples, generator=generator).tolist()


def sample_generator(seed: int, position: int) -> torch.Generator:
    """The randomness of the sample at global position `position`: a CPU generator seeded by sha256 of both."""
    return torch.Generator().manual_seed(_hashed_seed(seed, position))


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


class LatentRows:
    """Random access to rows of latent shards with a bounded cache: memory does not grow with the data set."""

    def __init__(self, folder: ShardFolder, indices: Sequence[int]):
        existing = folder.manifests()
        manifests = {index: existing[index] for index in indices if existing[index].rows}
        self.manifests, self.shards = manifests, list(manifests)
        self.starts = np.cumsum([0] + [manifest.rows for manifest in manifests.values()])
        self.flips: bool = folder.config.get("flips", False)
        self.table = functools.lru_cache(CACHED_SHARDS)(lambda shard: folder.read(shard, manifest=manifests[shard]))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def order(self, seed: int, epoch: int) -> list[int]:
        """A shuffle that reads shards in groups of CACHED_SHARDS: shards are permuted, then rows within a group."""
        shards = epoch_order(len(self.shards), seed, epoch)
        rows: list[int] = []
        for start in range(0, len(shards), CACHED_SHARDS):
            group = [row for shard in shards[start:start + CACHED_SHARDS]
                     for row in range(self.starts[shard], self.starts[shard + 1])]
            rows += [int(group[i]) for i in epoch_order(len(group), seed, epoch * len(shards) + start + 1)]
        return rows

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

    def _embed(self, row: int) -> torch.Tensor:
        chunks = self._value(row, "prompt_embeds", "embeds_shape")
        return torch.tensor(chunks.reshape(-1, chunks.shape[-1]))

    def _value(self, row: int, column: str, shape: str) -> np.ndarray:
        """float32 [K, ...]: the K items of the manifest's shape that a row holds."""
        position = int(np.searchsorted(self.starts, row, side="right")) - 1
        shard = self.shards[position]
        data = self.table(shard)[column][int(row - self.starts[position])].as_py()
        return np.frombuffer(data, dtype=np.float32).reshape(-1, *self.manifests[shard].details[shape])


class LatentPairs(LatentRows):
    """The pairs a DPO trainer reads."""

    def batch(self, indices: Sequence[int]) -> PairBatch:
        embeds, mask = self.stack_embeds(indices)
        winner, loser = (self.stack(indices, side, "latent_shape") for side in ("winner", "loser"))
        mirrored = (None, None)
        if self.flips:
            mirrored = tuple(self.stack(indices, side, "latent_shape") for side in MIRRORED)
        return PairBatch(winner, loser, embeds, mask, *mirrored)


class LatentImages(LatentRows):
    """The images an SFT trainer reads."""

    def batch(self, indices: Sequence[int]) -> ImageBatch:
        return ImageBatch(latents=self.stack(indices, "latents", "latent_shape"),
                          prompt_embeds=self.stack(indices, "prompt_embeds", "embeds_shape"),
                          mirrored=self.stack(indices, "mirrored", "latent_shape") if self.flips else None)
