"""Tiny data sets of pairs in the exact formats of the public ones, as tests write them."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.pair_sets import open_pair_set
from hgdpo_core.stages.pair_sets import PairSetStage
from hgdpo_core.storage import Store

PICK_A_PIC = pa.schema([
    ("are_different", pa.bool_()), ("best_image_uid", pa.string()), ("caption", pa.string()),
    ("created_at", pa.timestamp("ns")), ("has_label", pa.bool_()), ("image_0_uid", pa.string()),
    ("image_0_url", pa.string()), ("image_1_uid", pa.string()), ("image_1_url", pa.string()), ("jpg_0", pa.binary()),
    ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("label_1", pa.float64()), ("model_0", pa.string()),
    ("model_1", pa.string()), ("ranking_id", pa.int64()), ("user_id", pa.int64()),
    ("num_example_per_prompt", pa.int64()), ("__index_level_0__", pa.int64())])
"""Of `yuvalkirstain/pickapic_v2`."""
WINNER, LOSER = (220, 40, 40), (40, 40, 220)
"""Colours by which winner and loser are told apart: red wins."""


def image(colour: tuple[int, int, int], size: tuple[int, int] = (32, 32), form: str = "JPEG") -> bytes:
    """One colour, encoded."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form)
    return buffer.getvalue()


def striped(red_left: bool, size: tuple[int, int]) -> bytes:
    """A third of green, red and blue each, from the left; the other way round if not `red_left`."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    third = size[0] // 3
    for number, channel in enumerate((1, 0, 2) if red_left else (2, 0, 1)):
        pixels[:, number * third:(number + 1) * third if number < 2 else size[0], channel] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pair(number: int, winner: int | None = 0, **columns: Any) -> dict[str, Any]:
    """A row of Pick-a-Pic v2 whose image `winner` is the red one; None for a tie."""
    red, blue = image(WINNER), image(LOSER)
    labels = (0.5, 0.5) if winner is None else (1.0 - winner, float(winner))
    return {
        "are_different": True, "has_label": True, "caption": f"a woman, number {number}",
        "best_image_uid": "tie" if winner is None else f"u{number}-{winner}", "image_0_uid": f"u{number}-0",
        "image_1_uid": f"u{number}-1", "image_0_url": "https://gone.example/0", "image_1_url": "https://gone.example/1",
        "jpg_0": blue if winner else red, "jpg_1": red if winner else blue, "label_0": labels[0], "label_1": labels[1],
        "model_0": "sdxl", "model_1": "dreamlike", "ranking_id": number, "user_id": 1, "num_example_per_prompt": 1,
        "__index_level_0__": number, **columns}


def write_parquet(folder: Path, rows: Sequence[Mapping[str, Any]], *, files: int = 1, split: str = "train",
                  row_group_size: int = 3) -> Path:
    """`data/train-00000-of-00002-….parquet`, with row groups of a few rows."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for number in range(files):
        part = list(rows)[number * len(rows) // files:(number + 1) * len(rows) // files]
        table = pa.Table.from_pylist(part, schema=PICK_A_PIC)
        pq.write_table(table, folder / "data" / f"{split}-{number:05d}-of-{files:05d}-0123456789abcdef.parquet",
                       row_group_size=row_group_size)
    return folder


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    """A tar of these members."""
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_hpd(folder: Path, entries: Sequence[Mapping[str, Any]], images: Mapping[str, bytes]) -> Path:
    """`train.json` and `train.tar.gz` of `ymhao/HPDv2`, whose images lie in a folder of the tar."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text(json.dumps(list(entries)))
    write_tar(folder / "train.tar.gz", {f"train/{name}": data for name, data in images.items()}, "w:gz")
    return folder


def pair_stage(store: Store, source: PairSource, size: tuple[int, int]) -> PairSetStage:
    """The stage of a source's pairs."""
    return PairSetStage.of(store, open_pair_set(source, leave_out=store.local_path("")), size)
