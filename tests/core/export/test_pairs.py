"""Triplets as the pairs of other trainers: read back by each trainer's rule, right by pixel, nothing lost unsaid.

The rules are restated here from the sources named in `layouts.py`; the trainers' own code was run by hand
(docs/TRAINING.md).
"""

import io
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from flows.cli import main
from flows.parameters import PAIRS
from hgdpo_core.errors import ConfigError, HGDPOError, InputError
from hgdpo_core.export import export_pairs
from hgdpo_core.export.layouts import LAYOUTS
from hgdpo_core.export.pairs import (
    NO_CAPTION,
    NOT_WINNER,
    OTHER_KIND,
    OTHER_SIZE,
    UNREADABLE,
    find_triplets,
)
from hgdpo_core.stages.triplets import SCHEMA
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

CARD = "---\nlicense: cc-by-4.0\n---\n# A data set\n"
CAPTIONS = ['a woman, "laughing"', "un garçon\nà vélo\r\n", "a man / a girl", " two people ", "a nurse", "a king"]
ONE_LINE = ['a woman, "laughing"', "un garçon à vélo", "a man / a girl", "two people", "a nurse", "a king"]


def image(number, winner, *, kind="PNG", size=(8, 12)):
    """A winner has all its green; red is the number of its pair."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 255 if winner else 0, 0)).save(buffer, format=kind)
    return buffer.getvalue()


def pair(number, caption=None, **changes):
    empty = {field.name: None for field in SCHEMA}
    return {**empty, "jpg_0": image(number, True), "jpg_1": image(number, False), "label_0": 1.0, "label_1": 0.0,
            "caption": CAPTIONS[number % 6] if caption is None else caption, **changes}


def make_triplets(store, rows, *, name="6-abc", per_shard=2, card: str | None = CARD):
    folder = ShardFolder.create(store, f"triplets/{name}", {"stage": "triplets"})
    for index in range(-(-len(rows) // per_shard)):
        part = rows[index * per_shard:(index + 1) * per_shard]
        folder.commit(index, pa.Table.from_pylist(part, schema=SCHEMA))
    if card:
        store.write_bytes(f"triplets/{name}/README.md", card.encode())
    return folder


@pytest.fixture
def store(tmp_path):
    """A root with one data set of six good pairs in three shards."""
    store = Store(str(tmp_path / "root"))
    make_triplets(store, [pair(number) for number in range(6)])
    return store


# -- each trainer's rule of reading


def read_simpletuner(folder):
    """documentation/experimental/FLOW_DPO.md: the loser has the winner's base name in the strict reference's folder."""
    winners, losers, text = json.loads((folder / "multidatabackend.json").read_text())
    assert (winners["conditioning_data"], losers["source_dataset_id"]) == ([losers["id"]], winners["id"])
    assert (losers["dataset_type"], losers["conditioning_type"]) == ("conditioning", "reference_strict")
    assert text["dataset_type"] == "text_embeds" and text["default"]
    assert {(part["resolution"], part["resolution_type"]) for part in (winners, losers)} == {(96 / 1e6, "area")}
    for path in sorted(Path(winners["instance_data_dir"]).glob("*.png")):
        captions = [line for line in path.with_suffix(".txt").read_text().split("\n") if line]
        yield path, Path(losers["instance_data_dir"]) / path.name, captions


def read_onetrainer(folder):
    """dpo_pattern_util.py: what matches the chosen pattern, and the rejected one with the same text for {}."""
    [concept] = json.loads((folder / "concepts.json").read_text())
    assert concept["include_subdirectories"] and concept["text"]["prompt_source"] == "sample"
    root, chosen = Path(concept["path"]), re.escape(concept["dpo_chosen_pattern"]).replace(r"\{\}", "(.+)")
    for path in sorted(root.rglob("*.png")):
        if match := re.fullmatch(chosen, path.relative_to(root).with_suffix("").as_posix()):
            [loser] = root.glob(concept["dpo_rejected_pattern"].replace("{}", match[1]) + ".png")
            lines = path.with_suffix(".txt").read_text().splitlines()
            yield path, loser, [line.strip() for line in lines if line.strip()]


def read_kohya(folder):
    """library/train_util.py: the images of w/, the loser in l/ under the same name, the first line of the caption."""
    [dataset] = tomllib.loads((folder / "dataset_config.toml").read_text())["datasets"]
    [subset] = dataset["subsets"]
    assert subset["preference"] is True and dataset["resolution"] == [8, 12] and not dataset["enable_bucket"]
    for path in sorted((Path(subset["image_dir"]) / "w").glob("*.png")):
        caption = path.with_suffix(subset["caption_extension"]).read_text()
        assert len(caption.splitlines()) == 1
        yield path, path.parent.parent / "l" / path.name, [caption.splitlines()[0].strip()]


READERS = {"simpletuner": read_simpletuner, "onetrainer": read_onetrainer, "kohya": read_kohya}


def read_back(folder, layout):
    """(number in the winner's pixels, number in the loser's, caption) of each pair, in the order of names."""
    rows = []
    for winner, loser, captions in READERS[layout](folder):
        [caption] = captions
        good, bad = (np.asarray(Image.open(path))[0, 0] for path in (winner, loser))
        assert (good[1], bad[1]) == (255, 0)
        rows.append((good[0], bad[0], caption))
    return rows


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- what is written


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trainers_rule_finds_every_pair_with_winner_loser_and_caption(layout, store, tmp_path):
    out = tmp_path / 'for "it" é'
    result = export_pairs(store, out, layout)
    assert read_back(out, layout) == [(number, number, caption) for number, caption in enumerate(ONE_LINE)]
    assert (result.read, result.written, result.existing, result.refused, result.joined) == (6, 6, 0, {}, 1)
    files = files_of(out)
    stored = {data for number in range(6) for data in (image(number, True), image(number, False))}
    assert {data for name, data in files.items() if name.endswith(".png")} == stored, "the stored bytes, untouched"
    assert files["dataset_card.md"].decode() == CARD and result.config.is_file()
    assert "Licence: cc-by-4.0." in files["README.md"].decode()
    assert all(re.fullmatch(r"[\w/.]+|.*/\d{5}-\d{5}\.\w+", name) for name in files)


def test_what_these_trainers_cannot_read_is_refused_and_counted(store, tmp_path):
    small, jpeg = image(1, False, size=(8, 8)), image(1, False, kind="JPEG")
    rows = [pair(0), pair(1, label_0=0.0), pair(2, " \n"), pair(3, jpg_1=small), pair(4, jpg_1=jpeg), pair(5),
            pair(6, jpg_0=b"no image"), pair(7, jpg_1=image(7, False, kind="BMP")), pair(8, caption=None, jpg_1=None),
            pair(9, label_0=0.5)]
    make_triplets(store, rows, name="10-abc", per_shard=4)
    result = export_pairs(store, tmp_path / "out", "onetrainer", triplets="10-abc")
    assert result.refused == {NOT_WINNER: 2, NO_CAPTION: 1, OTHER_SIZE: 1, OTHER_KIND: 1, UNREADABLE: 3}
    assert result.read == len(rows) == result.written + sum(result.refused.values())
    assert [row[0] for row in read_back(tmp_path / "out", "onetrainer")] == [0, 5]
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "pairs: 2, of 10 read; refused: 8" in readme and f"{NOT_WINNER}: 2" in readme


def test_images_of_several_sizes_and_kinds(store, tmp_path):
    webp = {name: image(1, winner, kind="WEBP", size=(16, 8)) for name, winner in (("jpg_0", True), ("jpg_1", False))}
    make_triplets(store, [pair(0), pair(1, **webp)], name="2-abc")
    export_pairs(store, tmp_path / "out", "kohya", triplets="triplets/2-abc/")
    [dataset] = tomllib.loads((tmp_path / "out" / "dataset_config.toml").read_text())["datasets"]
    assert dataset["enable_bucket"] and dataset["resolution"] == [11, 11]  # as large as 16 x 8
    files = files_of(tmp_path / "out")
    assert files["pairs/w/00000-00001.webp"] == webp["jpg_0"] and files["pairs/l/00000-00001.webp"] == webp["jpg_1"]


# -- continuing


def test_a_stopped_export_continues_and_rewrites_nothing(store, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    export_pairs(store, whole, "simpletuner")

    def stop(done, total, unit):
        assert total == 6 and unit == "pairs"
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_pairs(store, out, "simpletuner", progress=stop)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(times) == 8
    (out / "lose" / "00001-00000.png").unlink()
    result = export_pairs(store, out, "simpletuner")
    assert (result.written, result.existing) == (6, 3)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path.name != "00001-00000.png")
    moved = {name: data.replace(str(out).encode(), str(whole).encode()) for name, data in files_of(out).items()}
    assert moved == files_of(whole)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert export_pairs(store, out, "simpletuner").existing == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_folder_left_before_the_first_shard_was_recorded_continues(store, tmp_path, monkeypatch):
    write, done = Store.write_bytes, []

    def stop(self, key, data):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(key)
        write(self, key, data)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Store, "write_bytes", stop)
        export_pairs(store, tmp_path / "out", "kohya")
    assert export_pairs(store, tmp_path / "out", "kohya").written == 6
    assert len(read_back(tmp_path / "out", "kohya")) == 6


def test_a_limit_counts_written_pairs_and_may_be_raised(store, tmp_path):
    out = tmp_path / "out"
    first = export_pairs(store, out, "kohya", limit=3)
    assert (first.read, first.written, len(read_back(out, "kohya"))) == (3, 3, 3)
    again = export_pairs(store, out, "kohya", limit=3)
    assert (again.written, again.existing) == (3, 3)
    with pytest.raises(InputError, match="holds 3 pairs already, the limit is 2"):
        export_pairs(store, out, "kohya", limit=2)
    result = export_pairs(store, out, "kohya")
    assert (result.read, result.written, result.existing, len(read_back(out, "kohya"))) == (6, 6, 3, 6)


# -- what is refused


def test_a_folder_of_something_else_is_left_alone(store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"mine is not empty and has no pairs\.json"):
        export_pairs(store, tmp_path / "mine", "kohya")
    assert [*files_of(tmp_path / "mine")] == ["photo.png"]
    export_pairs(store, tmp_path / "out", "kohya")
    with pytest.raises(InputError, match="holds pairs of triplets/6-abc for kohya, expected triplets/6-abc for onetr"):
        export_pairs(store, tmp_path / "out", "onetrainer")
    (tmp_path / "out" / "pairs.json").write_text('{"version": 2}')
    with pytest.raises(InputError, match="is not what an export of this version writes"):
        export_pairs(store, tmp_path / "out", "kohya")
    (tmp_path / "file").write_text("x")
    with pytest.raises(HGDPOError):
        export_pairs(store, tmp_path / "file", "kohya")


def test_a_shard_that_was_made_again_is_not_mixed_with_the_old_one(store, tmp_path):
    export_pairs(store, tmp_path / "out", "kohya")
    store.delete("triplets/6-abc/shard-00001.json")
    ShardFolder.open(store, "triplets/6-abc").commit(1, pa.Table.from_pylist([pair(9)], schema=SCHEMA))
    with pytest.raises(InputError, match="shard 1 of .*was made again"):
        export_pairs(store, tmp_path / "out", "kohya")


def test_the_data_set_is_found_by_key_or_id_or_as_the_only_one(store):
    assert {find_triplets(store, name) for name in (None, "6-abc", "triplets/6-abc", "triplets/6-abc/")} == {
        "triplets/6-abc"}
    make_triplets(store, [pair(0)], name="1-new", card=None)
    assert find_triplets(store, None) == "triplets/6-abc"
    with pytest.raises(InputError, match="1-new is not a finished data set .* it has triplets/6-abc; .* README"):
        find_triplets(store, "1-new")
    make_triplets(store, [pair(0)], name="1-other")
    with pytest.raises(InputError, match="holds 2 finished data sets of triplets, expected one where none is named"):
        find_triplets(store, None)


def test_no_usable_pair_and_no_such_layout(store, tmp_path):
    make_triplets(store, [pair(0, label_0=0.5)], name="1-tie")
    with pytest.raises(InputError, match=f"1-tie has no pair that kohya's sd-scripts can read: {NOT_WINNER}: 1"):
        export_pairs(store, tmp_path / "out", "kohya", triplets="1-tie")
    with pytest.raises(ConfigError, match="no layout 'x': choose simpletuner, onetrainer, kohya"):
        export_pairs(store, tmp_path / "out", "x")


# -- the command


def test_the_command(store, tmp_path, capsys):
    assert next(item for item in PAIRS if item.name == "layout").choices == tuple(LAYOUTS)
    command = ["pairs", "--layout", "kohya", "--root", store.root, "--to", str(tmp_path / "out")]
    assert main([*command, "--limit", "4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["Pairs of triplets/6-abc: 4 written (there before: 0) of 4 read",
                       "Captions of several lines, made one: 1",
                       str(tmp_path / "out" / "dataset_config.toml")]
    assert main([*command, "--triplets", "none"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hgdpo: error: none is not a finished data set") and error.count("\n") == 1
