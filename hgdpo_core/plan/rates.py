"""Seconds per image, pair or step, from existing shards; and assumed sizes where neither shards nor a probe tell.

Times are never guessed: without a measurement there is none. Sizes follow from the model's files and the size of the
images; only the compression of images is assumed.
"""

from collections.abc import Iterable
from typing import NamedTuple

from hgdpo_core.config import ImageFormat
from hgdpo_core.storage.shards import ShardManifest

BYTES_PER_PIXEL: dict[ImageFormat, float] = {"png": 1.6, "webp": 1.2, "jpeg": 0.35}   # assumed, for photographs
SHARD_BYTES = 8_000             # of a shard without its rows: Parquet's own, and the manifest
CHECKPOINTS = 2                 # that a training keeps
OPTIMIZER_FLOATS = 3            # a trained number and its two moments


class Rate(NamedTuple):
    """Seconds for one unit of work, and their source."""

    seconds: float
    basis: str


def measured(manifests: Iterable[ShardManifest], device: str) -> Rate | None:
    """The rate of these shards, of those made on `device` if there are any; None without a timed shard."""
    timed = [manifest for manifest in manifests if manifest.seconds > 0 and manifest.rows]
    timed = [manifest for manifest in timed if manifest.device == device] or timed
    if not timed:
        return None
    seconds, units = sum(manifest.seconds for manifest in timed), sum(manifest.units for manifest in timed)
    devices = ", ".join(sorted({manifest.device for manifest in timed}))
    return Rate(seconds / units, f"{len(timed)} shards made on {devices}")

