"""Stand-ins for a public data set: its columns, labels as the labeller says, repeatable, taken up after a stop."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hgdpo_core.errors import InputError
from hgdpo_core.figures import foreign_pairs
from hgdpo_core.figures.foreign import foreign_prompts, parse_scene
from hgdpo_core.figures.foreign.renderer import render_scenes
from hgdpo_core.figures.foreign_pairs import RECORD, PairsOf, first_two_of, write_foreign_pairs
from hgdpo_core.figures.labeller import TIE_BAND, Labeller, load_labeller, prefer_first, save_labeller
from hgdpo_core.figures.make.labeller import known_words
from hgdpo_core.images import encode_image

# Pick-a-Pic v2's card (https://huggingface.co/datasets/yuvalkirstain/pickapic_v2), written down, not read from the code
PUBLISHED = {
    "are_different": "bool", "best_image_uid": "string", "caption": "string", "created_at": "timestamp[ns]",
    "has_label": "bool", "image_0_uid": "string", "image_0_url": "string", "image_1_uid": "string",
    "image_1_url": "string", "jpg_0": "binary", "jpg_1": "binary", "label_0": "double", "label_1": "double",
    "model_0": "string", "model_1": "string", "ranking_id": "int64", "user_id": "int64",
    "num_example_per_prompt": "int64", "__index_level_0__": "int64"}
CAPTIONS = foreign_prompts("train", 25, seed=7)


def by_seeds(generate: Callable[[Sequence[str], Sequence[int]], np.ndarray], seed: int) -> PairsOf:
    """Pairs by a function that returns one image, uint8 `[B,64,64,3]`, for each caption and its seed."""
    def numbers(texts, side):
        return [int.from_bytes(hashlib.sha256(f"{seed} {text} {side}".encode()).digest()[:7], "big") for text in texts]

    def pairs(captions):
        sides = [generate(captions, numbers(captions, side)) for side in (0, 1)]
        return [(encode_image(first, "png"), encode_image(second, "png")) for first, second in zip(*sides, strict=True)]

    return pairs


def draw(captions, seeds):
    """Drawings in place of a generator's images; the first caption's are alike."""
    images = render_scenes([parse_scene(text) for text in captions], [seed % 2**32 for seed in seeds])
    return np.where([[[[text == CAPTIONS[0]]]] for text in captions], 128, images).astype(np.uint8)


@pytest.fixture(scope="module")
def labeller(tmp_path_factory):
    """Without training, but with opinions: some ties, some not."""
    torch.manual_seed(0)
    network = Labeller(known_words())
    network.temperature = torch.tensor(0.05)
    folder = tmp_path_factory.mktemp("labeller")
    save_labeller(network, folder)
    return folder


def write(folder, labeller, pairs_of=None, **options):
    given = {"labeller": labeller, "model": "drawings", "fingerprint": "0", "pairs_per_file": 10, **options}
    return write_foreign_pairs(folder, given.pop("captions", CAPTIONS), pairs_of or by_seeds(draw, 3), **given)


@pytest.fixture(scope="module")
def written(labeller, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "stand-in"
    return folder, write(folder, labeller)


def read(folder):
    return [row for path in sorted((folder / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_the_files_have_the_published_columns(written):
    folder, _ = written
    files = sorted(path.name for path in (folder / "data").iterdir())
    assert files == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    for name in files:
        schema = pq.read_schema(folder / "data" / name)
        assert {field.name: str(field.type) for field in schema} == PUBLISHED
    rows = read(folder)
    assert [row["caption"] for row in rows] == CAPTIONS and [row["ranking_id"] for row in rows] == list(range(25))
    assert {row["model_0"] for row in rows} == {row["model_1"] for row in rows} == {"drawings (stand-in)"}
    assert all(row["has_label"] and row["label_0"] + row["label_1"] == 1 for row in rows)
    assert len({row[name] for row in rows for name in ("image_0_uid", "image_1_uid")}) == 50


def test_the_labels_are_the_labellers_and_the_counts_add_up(written, labeller):
    folder, counts = written
    rows, network = read(folder), load_labeller(labeller)
    for row in rows:
        sides = [np.array(Image.open(io.BytesIO(row[name])))[None] for name in ("jpg_0", "jpg_1")]
        p = float(prefer_first(network, [row["caption"]], *sides))
        expected = 0.5 if abs(p - 0.5) < TIE_BAND else float(p > 0.5)
        assert row["label_0"] == expected or abs(abs(p - 0.5) - TIE_BAND) < 1e-3  # a batch rounds in another way
        best = {0.5: "tie", 1.0: row["image_0_uid"], 0.0: row["image_1_uid"]}[row["label_0"]]
        assert row["best_image_uid"] == best
    assert [row["are_different"] for row in rows] == [False] + [True] * 24
    assert counts.pairs == 25 == counts.first_preferred + counts.second_preferred + counts.ties + counts.identical
    assert counts.identical == 1 and counts.first_preferred > 0 and counts.second_preferred > 0


def test_the_same_call_writes_the_same_bytes(written, labeller, tmp_path):
    folder, counts = written
    assert write(tmp_path / "again", labeller) == counts
    for path in (folder / "data").iterdir():
        assert (tmp_path / "again" / "data" / path.name).read_bytes() == path.read_bytes()
    write(tmp_path / "other", labeller, by_seeds(draw, 4))
    assert [row["jpg_0"] for row in read(tmp_path / "other")][1:] != [row["jpg_0"] for row in read(folder)][1:]


def test_a_stopped_call_is_taken_up_again(written, labeller, tmp_path):
    folder, counts = written
    shutil.copytree(folder, tmp_path / "part")
    (tmp_path / "part" / "data" / "train-00001-of-00003.parquet").unlink()
    asked = []

    def counted(captions):
        asked.extend(captions)
        return by_seeds(draw, 3)(captions)

    assert write(tmp_path / "part", labeller, counted) == counts
    assert asked == CAPTIONS[10:20] and read(tmp_path / "part") == read(folder)


def test_other_pairs_and_other_folders_are_refused(written, labeller, tmp_path):
    folder, _ = written
    with pytest.raises(InputError, match="holds other stand-in pairs"):
        write(folder, labeller, fingerprint="1")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        write(tmp_path, labeller)
    for captions in ([], ["a", "a"]):
        with pytest.raises(InputError, match="distinct captions"):
            write(tmp_path / "new", labeller, captions=captions)
    large = by_seeds(lambda captions, seeds: np.zeros((len(captions), 96, 64, 3), np.uint8), 0)
    with pytest.raises(InputError, match="64 x 64"):
        write(tmp_path / "large", labeller, large)


def test_it_says_that_it_stands_in(written):
    record = json.loads((written[0] / RECORD).read_text())
    assert record["stand_in"] is True and record["captions"] == 25


def test_the_first_two_images_of_a_generator_make_a_pair():
    class Four:
        def generate(self, prompts):
            rows = [{"prompt": text, "index": i, "image": f"{text}{i}".encode()} for text in prompts for i in range(4)]
            return reversed(rows)  # prompts with longer embeddings come last, so order says nothing

    assert first_two_of(Four())(["a", "b"]) == [(b"a0", b"a1"), (b"b0", b"b1")]


def test_a_file_at_a_time_is_in_memory(labeller, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(foreign_pairs, "_write", lambda path, rows: sizes.append(len(rows)))
    monkeypatch.setattr(foreign_pairs, "count_pairs", lambda files: None)
    write(tmp_path / "new", labeller)
    assert sizes == [10, 10, 5]
