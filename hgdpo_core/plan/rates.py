"""What one image, pair or step takes, from shards that are there; and bytes, where neither shards nor a probe tell.

Times are never guessed: a device that nobody measured has none. Sizes follow from the model's files and the images'
size, but for the compression of images, which is assumed.
"""

from collections.abc import Iterable
from typing import NamedTuple

from hgdpo_core.config import ImageFormat
from hgdpo_core.storage.shards import ShardManifest

BYTES_PER_PIXEL: dict[ImageFormat, float] = {"png": 1.6, "webp": 1.2, "jpeg": 0.35}   # assumed, for photographs
SHARD_BYTES = 8_000             # of a shard without its rows: Parquet's own, and the manifest
CHECKPOINTS = 2                 # a training keeps so many
OPTIMIZER_FLOATS = 3            # a trained number and its two moments


class Rate(NamedTuple):
    """Seconds for one unit of work, and where that is known from."""

    seconds: float
    basis: str


def measured(manifests: Iterable[ShardManifest], device: str) -> Rate | None:
    """What these shards took a row, those made on `device` if there are any; None when none tells."""
    timed = [manifest for manifest in manifests if manifest.seconds > 0 and manifest.rows]
    timed = [manifest for manifest in timed if manifest.device == device] or timed
    if not timed:
        return None
    seconds, rows = sum(manifest.seconds for manifest in timed), sum(manifest.rows for manifest in timed)
    devices = ", ".join(sorted({manifest.device for manifest in timed}))
    return Rate(seconds / rows, f"{len(timed)} shards made on {devices}")


# -- the size of a model, read from the headers of its files
