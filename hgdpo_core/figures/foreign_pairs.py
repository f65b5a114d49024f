"""Stand-ins for a public preference data set: pairs of another generator's images, labelled by the labeller.

A generator's images have no ground truth and the inspector is the witness of a comparison, so a third network labels
them (`labeller.py`; its error rate is in the card of the weights). What is written is a folder of Parquet files with
the columns of Pick-a-Pic v2, as its own on the hub: what reads that data set reads this one. Names of models end in
"(stand-in)".
"""

import hashlib
import io
import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from hgdpo_core.errors import InputError
from hgdpo_core.images import decode_image
from hgdpo_core.storage.local import write_atomically

from .labeller import TIE_BAND, Labeller, load_labeller, prefer_first

COLUMNS = pa.schema([
    ("are_different", pa.bool_()), ("best_image_uid", pa.string()), ("caption", pa.string()),
    ("created_at", pa.timestamp("ns")), ("has_label", pa.bool_()), ("image_0_uid", pa.string()),
    ("image_0_url", pa.string()), ("image_1_uid", pa.string()), ("image_1_url", pa.string()), ("jpg_0", pa.binary()),
    ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("label_1", pa.float64()), ("model_0", pa.string()),
    ("model_1", pa.string()), ("ranking_id", pa.int64()), ("user_id", pa.int64()),
    ("num_example_per_prompt", pa.int64()), ("__index_level_0__", pa.int64())])
"""Pick-a-Pic v2's. The `jpg` columns hold any encoded image; here PNG, so that nothing is lost."""
RECORD = "stand_in.json"
STAND_IN = "(stand-in)"
PAIRS_PER_FILE = 512
BATCH = 64
SIZE = (64, 64)

PairsOf = Callable[[Sequence[str]], Sequence[tuple[bytes, bytes]]]
"""Two encoded images of 64 x 64 pixels for each caption; the same captions give the same images."""


@dataclass(frozen=True)
class PairCounts:
    """What the labels of the pairs are; the other four add up to `pairs`."""

    pairs: int
    first_preferred: int
    second_preferred: int
    ties: int
    identical: int
    """Both images have the same bytes; `are_different` is false."""


class Generator(Protocol):
    """What generates several images per prompt, as `ImageGenerator` does: rows with prompt, index and image."""

    def generate(self, prompts: Sequence[str]) -> Iterable[dict]: ...


def first_two_of(generator: Generator) -> PairsOf:
    """The first two images that a generator of at least two per prompt makes, as they are encoded."""
    def pairs(captions: Sequence[str]) -> list[tuple[bytes, bytes]]:
        found = {(row["prompt"], row["index"]): row["image"] for row in generator.generate(captions)
                 if row["index"] < 2}
        return [(found[text, 0], found[text, 1]) for text in captions]

    return pairs


def write_foreign_pairs(folder: Path, captions: Sequence[str], pairs_of: PairsOf, *, labeller: Path, model: str,
                        fingerprint: str, pairs_per_file: int = PAIRS_PER_FILE) -> PairCounts:
    """Write one labelled pair for each caption as `folder`/data/train-*.parquet, and count the labels.

    `labeller`: the folder of its weights; `model`: the name of what made the images; `fingerprint`: whatever else
    decides them. Files that are there are kept, so a stopped call is taken up again, and memory holds one file.
    InputError for no or repeated captions, for images of another size, and where the folder holds other pairs.
    """
    if not captions or len(set(captions)) < len(captions):
        raise InputError(f"stand-in pairs need distinct captions; got {len(captions)}, {len(set(captions))} of them "
                         "distinct: leave the repeated ones out")
    _claim(folder, _settings(captions, labeller, model, fingerprint, pairs_per_file))
    network, count = load_labeller(labeller), -(-len(captions) // pairs_per_file)
    files = [folder / "data" / f"train-{i:05d}-of-{count:05d}.parquet" for i in range(count)]
    for i, path in enumerate(tqdm(files, desc="stand-in pairs", mininterval=2)):
        if not path.exists():
            first = i * pairs_per_file
            rows = _label(captions[first:first + pairs_per_file], first, pairs_of, network, f"{model} {STAND_IN}")
            _write(path, rows)
    return count_pairs(files)


def _settings(captions: Sequence[str], labeller: Path, model: str, fingerprint: str, pairs_per_file: int) -> dict:
    """What decides the pairs."""
    return {"stand_in": True, "captions": len(captions),
            "captions_sha256": hashlib.sha256("\n".join(captions).encode()).hexdigest(), "model": model,
            "fingerprint": fingerprint, "tie_band": TIE_BAND, "pairs_per_file": pairs_per_file,
            "labeller_sha256": hashlib.sha256((labeller / "model.safetensors").read_bytes()).hexdigest()}


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Record what the folder holds; InputError where it holds something else."""
    path = folder / RECORD
    if path.exists():
        if json.loads(path.read_text()) != settings:
            raise InputError(f"{folder} holds other stand-in pairs: expected those of {settings['model']} for "
                             f"{settings['captions']} captions; give another folder, or delete it")
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no {RECORD}: give an empty folder for stand-in pairs")
    write_atomically(path, lambda file: file.write(json.dumps(settings, indent=1).encode()))


def _label(captions: Sequence[str], first: int, pairs_of: PairsOf, labeller: Labeller, model: str) -> list[dict]:
    """The rows of some captions, of which the first is number `first` of the data set."""
    rows: list[dict] = []
    for start in range(0, len(captions), BATCH):
        texts = captions[start:start + BATCH]
        images = pairs_of(texts)
        left, right = (np.stack([_pixels(pair[side]) for pair in images]) for side in (0, 1))
        probabilities = prefer_first(labeller, texts, left, right).tolist()
        rows += [_row(first + start + i, text, pair, p, model)
                 for i, (text, pair, p) in enumerate(zip(texts, images, probabilities, strict=True))]
    return rows


def _pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    if image.size != SIZE:
        raise InputError(f"the labeller reads images of 64 x 64 pixels; got {image.width} x {image.height}: sample the "
                         "stand-in pairs at that size")
    return np.asarray(image)


def _row(number: int, caption: str, pair: tuple[bytes, bytes], probability: float, model: str) -> dict[str, Any]:
    """One row of COLUMNS; a label is 1 where its image is preferred, 0 where the other is, 0.5 for a tie."""
    different = pair[0] != pair[1]
    tie = not different or abs(probability - 0.5) < TIE_BAND
    label = 0.5 if tie else float(probability > 0.5)
    uids = [str(uuid.UUID(bytes=hashlib.sha256(f"{number}\0{side}\0".encode() + data).digest()[:16]))
            for side, data in enumerate(pair)]
    best = "tie" if tie else uids[0] if label == 1.0 else uids[1]
    return {"are_different": different, "best_image_uid": best, "caption": caption, "created_at": 0, "has_label": True,
            "image_0_uid": uids[0], "image_0_url": "", "image_1_uid": uids[1], "image_1_url": "", "jpg_0": pair[0],
            "jpg_1": pair[1], "label_0": label, "label_1": 1.0 - label, "model_0": model, "model_1": model,
            "ranking_id": number, "user_id": 0, "num_example_per_prompt": 1, "__index_level_0__": number}


def _write(path: Path, rows: list[dict]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=COLUMNS), buffer, compression="none")
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def count_pairs(files: Iterable[Path]) -> PairCounts:
    """The counts over written files, from their labels alone."""
    tables = [pq.read_table(path, columns=["label_0", "are_different"]) for path in files]
    table = pa.concat_tables(tables).to_pydict()
    labels, different = np.array(table["label_0"]), np.array(table["are_different"])
    tied = labels == 0.5
    return PairCounts(len(labels), int((labels == 1).sum()), int((labels == 0).sum()), int((tied & different).sum()),
                      int((~different).sum()))
