"""Public data sets of pairs as triplets: the winner first, what is dropped counted by its reason, and the card."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard
from pair_files import (
    LOSER,
    PICK_A_PIC,
    WINNER,
    image,
    pair,
    pair_stage,
    striped,
    write_hpd,
    write_parquet,
    write_tar,
)

from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.errors import ConfigError, InputError
from hgdpo_core.images import decode_image
from hgdpo_core.pair_sets import rows as row_reasons
from hgdpo_core.pair_sets.sets import open_pair_set
from hgdpo_core.prompts import prompt_id
from hgdpo_core.stages import STAGES
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.dataset_card import card_licence
from hgdpo_core.stages.pair_sets import PairSetStage, write_pair_card
from hgdpo_core.stages.triplets import SCHEMA
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import read_table

SIZE = (24, 16)


def make(tmp_path, source, size=SIZE, **settings) -> PairSetStage:
    stage = pair_stage(Store(str(tmp_path / "root")), PairSource(source=str(source), **settings), size)
    assert stage.make(Worker("cpu")) == len(stage.pairs)
    return stage


def rows_of(stage: PairSetStage) -> list[dict]:
    return [row for index in stage.indices for row in stage.folder.read(index, schema=SCHEMA).to_pylist()]


def rejected_of(stage: PairSetStage) -> list[dict]:
    return [row for name in sorted(stage.folder.rejected())
            for row in read_table(stage.folder.store, f"{stage.folder.key}/rejected/{name}.parquet").to_pylist()]


def check_sums(stage: PairSetStage) -> None:
    counts = stage.counts()
    assert counts.read == len(stage.pairs) == counts.triplets + sum(counts.reasons.values())
    assert counts.rejected == len(rejected_of(stage)) and counts.triplets == len(rows_of(stage))
    assert set(counts.reasons) <= set(row_reasons.REASONS)


def is_red(data: bytes) -> bool:
    red, _, blue = np.asarray(decode_image(data)).reshape(-1, 3).mean(0)
    return red > blue + 50


def check_winners(stage: PairSetStage) -> None:
    for row in rows_of(stage):
        assert is_red(row["jpg_0"]) and not is_red(row["jpg_1"])
        assert (row["label_0"], row["label_1"]) == (1.0, 0.0) and row["best_image_uid"] == row["image_0_uid"]
        assert decode_image(row["jpg_0"]).size == decode_image(row["jpg_1"]).size == SIZE


BAD = {
    "no caption": ({"caption": "  "}, "it has no prompt"), "null caption": ({"caption": None}, "it has no prompt"),
    "minor": ({"caption": "a naked child"}, row_reasons.MINOR),
    "sexual": ({"caption": "a nude man"}, row_reasons.SEXUAL),
    "no label": ({"has_label": False}, "it has no label"), "null label": ({"label_0": None}, "it has no label"),
    "nan label": ({"label_0": float("nan")}, "it has no label"),
    "same": ({"are_different": False}, row_reasons.SAME_IMAGES),
    "tie": ({"label_0": 0.5, "label_1": 0.5}, "it is a tie"),
    "other": ({"label_0": 0.7, "label_1": 0.3}, row_reasons.BAD_LABEL),
    "contradiction": ({"label_0": 1.0, "label_1": 1.0}, row_reasons.BAD_LABEL),
    "null image": ({"jpg_1": None}, "an image is missing"), "empty image": ({"jpg_0": b""}, "an image does not decode"),
    "broken image": ({"jpg_0": image(WINNER)[:200]}, "an image does not decode"),
    "text": ({"jpg_1": b"no image"}, "an image does not decode"),
    "same bytes": ({"jpg_0": image(LOSER), "jpg_1": image(LOSER)}, row_reasons.SAME_IMAGES),
    "small": ({"jpg_0": image(WINNER, (11, 16))}, row_reasons.TOO_SMALL),
}


def test_pick_a_pic_the_winner_is_first_and_every_row_is_counted_once(tmp_path):
    good = [pair(number, number % 2) for number in range(9)]
    odd = [pair(20, 0, jpg_0=image(WINNER, (97, 41)), jpg_1=image(LOSER, (12, 300), "PNG")),
           pair(21, 1, jpg_0=image(LOSER, (12, 8), "WEBP"))]  # exactly two times is kept
    bad = [pair(100 + number, 1, **columns) for number, (columns, _) in enumerate(BAD.values())]
    mixed = [*good[:5], *bad[:7], *odd, *bad[7:], *good[5:]]
    source = write_parquet(tmp_path / "pickapic", mixed, files=3)
    stage = make(tmp_path, source, rows_per_shard=4)
    check_sums(stage)
    check_winners(stage)
    rows = rows_of(stage)
    used = [row for row in mixed if row not in bad]
    assert [row["caption"] for row in rows] == [row["caption"] for row in used]
    assert [row["winner_index"] for row in rows] == [int(row["label_1"]) for row in used]
    assert [row["best_image_uid"] for row in rows] == [row["best_image_uid"] for row in used]
    assert [row["model_0"] for row in rows] == [("sdxl", "dreamlike")[int(row["label_1"])] for row in used]
    expected = {reason: sum(one == reason for _, one in BAD.values()) for _, reason in BAD.values()}
    assert stage.counts().reasons == expected and stage.counts().triplets == len(good) + len(odd)
    assert (rejected_of(stage)[0]["prompt"], rejected_of(stage)[0]["reason"]) == ("  ", "it has no prompt")
    without = {row["reason"] for row in rejected_of(stage) if row["prompt"] is None}
    assert without == {"it has no prompt", row_reasons.MINOR}


def test_rows_are_those_of_our_own_triplets_without_scores(tmp_path):
    stage = make(tmp_path, write_parquet(tmp_path / "mine", [pair(0, 1)]))
    (row,) = rows_of(stage)
    assert row["prompt_id"] == prompt_id("a woman, number 0") and row["pool_size"] == row["loser_rank"] == 2
    assert row["model_fingerprint"] == f"foreign:mine@{stage.pairs.revision}"
    assert [row[name] for name in ("winner_score", "loser_score", "winner_seed", "loser_seed", "pool_id",
                                   "scorer_fingerprint")] == [None] * 6
    assert STAGES["pair_sets"] is PairSetStage and stage.folder.config["stage"] == "pair_sets"
    # a worker opens the same one from what is stored, and finds nothing to do
    again = PairSetStage.open(stage.folder, json.loads(json.dumps(stage.recipe())), stage.indices)
    assert again.find_missing() == [] and again.folder.key == stage.folder.key


def test_images_cover_the_size_and_lose_what_stands_over(tmp_path):
    wide, tall = striped(True, (96, 32)), striped(False, (32, 96))
    stage = make(tmp_path, write_parquet(tmp_path / "mine", [pair(0, 0, jpg_0=wide, jpg_1=tall)]), (32, 32))
    (row,) = rows_of(stage)
    middle = np.asarray(decode_image(row["jpg_0"])).astype(int)  # the middle third of the wide one is red
    assert middle.shape == (32, 32, 3) and (middle[:, 2:-2] == (255, 0, 0)).all()
    whole = np.asarray(decode_image(row["jpg_1"]))  # the tall one keeps its width: blue, red, green
    assert (whole[:, :8] == (0, 0, 255)).all() and (whole[:, -8:] == (0, 255, 0)).all()


def test_a_size_of_its_own_other_settings_and_other_rows_are_other_data_sets(tmp_path):
    source = write_parquet(tmp_path / "pickapic", [pair(number) for number in range(10)], files=2)
    store, key = Store(str(tmp_path / "root")), {}
    for settings in ({}, {"size": "16x8"}, {"limit": 4}, {"limit": 4, "sample_seed": 0}, {"limit": 4, "sample_seed": 1},
                     {"human_only": True}, {"keep_sexual": True}, {"rows_per_shard": 3}, {"image_format": "jpeg"}):
        stage = pair_stage(store, PairSource(source=str(source), **settings), SIZE)
        assert stage.make(Worker("cpu")) == settings.get("limit", 10) == len(rows_of(stage))
        key[json.dumps(settings)] = stage.folder.key
        assert stage.image_size == ((16, 8) if "size" in settings else SIZE)
    assert len(set(key.values())) == len(key) == 9
    same = pair_stage(store, PairSource(source=str(source), licence="mit", format="parquet", size=SIZE), (8, 8))
    assert same.folder.key == key["{}"]
    source.rename(tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("pairs")  # beside the data
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "moved").rename(tmp_path / "elsewhere" / "pickapic")
    assert pair_stage(store, PairSource(source=str(moved)), SIZE).folder.key == key["{}"]
    write_parquet(moved, [pair(number, 1) for number in range(10)], files=2)
    assert pair_stage(store, PairSource(source=str(moved)), SIZE).folder.key != key["{}"]


def test_the_first_rows_need_the_first_files_and_a_sample_is_drawn_from_all(tmp_path):
    source = write_parquet(tmp_path / "pickapic", [pair(number) for number in range(30)], files=3)
    first = make(tmp_path, source, limit=7)
    assert [row["caption"] for row in rows_of(first)] == [f"a woman, number {number}" for number in range(7)]
    assert len(first.pairs.files) == 1
    drawn = make(tmp_path, source, limit=12, sample_seed=3, rows_per_shard=5)
    captions = [row["caption"] for row in rows_of(drawn)]
    numbers = [int(caption.split()[-1]) for caption in captions]
    assert numbers == sorted(set(numbers)) and len(numbers) == 12 and max(numbers) > 20
    assert drawn.pairs.rows == open_pair_set(drawn.pairs.source).rows


def test_people_only_and_sexual_prompts_on_request(tmp_path):
    prompts = ["a house", "a man", "a nude man", "a naked child", "portrait of a knight", "portrait of a fox"]
    source = write_parquet(tmp_path / "p", [pair(n, 0, caption=prompt) for n, prompt in enumerate(prompts)])
    kept = {name: [row["caption"] for row in rows_of(make(tmp_path, source, **settings))] for name, settings in {
        "default": {}, "human": {"human_only": True}, "sexual": {"keep_sexual": True}}.items()}
    assert kept == {"default": ["a house", "a man", "portrait of a knight", "portrait of a fox"],
                    "human": ["a man", "portrait of a knight"],
                    "sexual": ["a house", "a man", "a nude man", "portrait of a knight", "portrait of a fox"]}


def test_no_image_of_a_refused_prompt_is_decoded(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("hgdpo_core.stages.pair_sets.decode_image",
                        lambda data: opened.append(data) or decode_image(data))
    prompts = ["a naked child", "a nude man", "a house"]
    make(tmp_path, write_parquet(tmp_path / "p", [pair(n, 0, caption=text) for n, text in enumerate(prompts)]),
         human_only=True)
    assert opened == []


def test_splits_and_subsets_are_files_by_their_names(tmp_path):
    for split, count in {"train": 4, "validation": 3, "validation_unique": 2}.items():
        write_parquet(tmp_path / "p", [pair(n) for n in range(count)], split=split)
    counts = {split: len(make(tmp_path, tmp_path / "p", split=split).pairs)
              for split in ("train", "validation", "validation_unique")}
    assert counts == {"train": 4, "validation": 3, "validation_unique": 2}
    assert len(make(tmp_path, tmp_path / "p", subset="data").pairs) == 4
    with pytest.raises(InputError, match="no split test: it has train, validation, validation_unique"):
        open_pair_set(PairSource(source=str(tmp_path / "p"), split="test"))
    with pytest.raises(InputError, match="no folder other"):
        open_pair_set(PairSource(source=str(tmp_path / "p"), subset="other"))


def test_own_parquet_with_structs_of_bytes_and_the_least_columns(tmp_path):
    colours = {0: LOSER, 1: WINNER}
    rows = [{"caption": "a man", "label_0": n % 2, "jpg_0": {"bytes": image(colours[n % 2]), "path": None},
             "jpg_1": {"bytes": image(colours[1 - n % 2]), "path": "b.jpg"}} for n in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mine.parquet")
    for source in (tmp_path / "mine.parquet", tmp_path / "*.parquet", f"file://{tmp_path}/mine.parquet"):
        stage = pair_stage(Store(str(tmp_path / "root")), PairSource(source=str(source)), SIZE)
        stage.make(Worker("cpu"))
        check_winners(stage)
        assert len(rows_of(stage)) == 4
    assert rows_of(stage)[0]["image_0_uid"] == "mine.parquet#0-1" and rows_of(stage)[0]["model_0"] is None


def test_tars_with_the_columns_of_pick_a_pic(tmp_path):
    members = {}
    for number in range(6):
        row = pair(number, number % 2)
        if number == 4:
            row |= {"label_0": 0.5, "label_1": 0.5}
        members |= {f"{number:04d}.json": json.dumps({name: value for name, value in row.items()
                                                      if not name.startswith("jpg")}).encode(),
                    f"{number:04d}.jpg_0": row["jpg_0"], f"{number:04d}.jpg_1.jpg": row["jpg_1"]}
    del members["0003.jpg_1.jpg"]
    members["0005.json"] = b"{"
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a-0.tar", dict(list(members.items())[:7]))
    others = {"0007.txt": b"a caption", "0007.cls": b"1", "0008.cls": b"2", ".hidden": b""}
    write_tar(tmp_path / "tars" / "a-1.tar", {name: members[name] for name in list(members)[9:]} | others)
    (tmp_path / "tars" / "README.md").write_text("a card")
    stage = make(tmp_path, tmp_path / "tars", rows_per_shard=2)
    assert stage.pairs.skipped == {
        "files of another split or kind": 1, "members of tars of the kind txt": 1, "members of tars of the kind cls": 2,
        "hidden or special members of tars": 1}
    write_pair_card(stage)
    card = stage.folder.store.read_bytes(f"{stage.folder.key}/README.md").decode()
    assert "Not read: 1 files of another split or kind, 1 members of tars of the kind txt, 2 members" in card
    check_sums(stage)
    check_winners(stage)
    assert stage.counts().reasons == {row_reasons.NO_IMAGE: 2, row_reasons.TIE: 1, row_reasons.UNREADABLE: 1}
    assert len(rows_of(stage)) == 2 and len(stage.pairs) == 6


def test_json_lines_beside_images(tmp_path):
    folder = tmp_path / "mine" / "part"
    (folder / "images").mkdir(parents=True)
    for number in range(3):
        (folder / "images" / f"{number}-good.jpg").write_bytes(image(WINNER))
        (folder / "images" / f"{number}-bad.png").write_bytes(image(LOSER, form="PNG"))
    lines = [{"prompt": f"a man {n}", "winner": f"images/{n}-good.jpg", "loser": f"./images/{n}-bad.png"}
             for n in range(3)]
    lines += [{"prompt": "gone", "winner": "images/gone.jpg", "loser": "images/0-bad.png"},
              {"prompt": "outside", "winner": "../../secret.jpg", "loser": "images/0-bad.png"},
              {"prompt": 7, "winner": "images/0-good.jpg", "loser": "images/0-bad.png"},
              {"prompt": "null", "winner": None, "loser": "images/0-bad.png"}]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stage = make(tmp_path, tmp_path / "mine", rows_per_shard=2)
    check_sums(stage)
    check_winners(stage)
    assert [row["caption"] for row in rows_of(stage)] == ["a man 0", "a man 1", "a man 2"]
    assert stage.counts().reasons == {row_reasons.NO_IMAGE: 2, row_reasons.UNREADABLE: 2}
    one_file = make(tmp_path, folder / "pairs.jsonl")
    assert len(rows_of(one_file)) == 3
    revision = stage.pairs.revision
    (folder / "images" / "0-good.jpg").write_bytes(image((230, 0, 0)))
    assert open_pair_set(PairSource(source=str(tmp_path / "mine"))).revision != revision


def test_hpd_the_tar_is_matched_by_base_names_in_one_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = {f"{n:08d}.jpg": image(WINNER if n % 2 == 0 else LOSER) for n in range(12)}
    images["00000010.jpg"] = b"does not decode"
    entries = [{"prompt": f"a dancer {n}", "file_path": [f"{n:08d}.jpg", f"{n + 1:08d}.jpg"],
                "human_preference": [1, 0]} for n in range(0, 8, 2)]
    entries[1] = {"prompt": "swapped", "image_path": ["some/00000003.jpg", "00000002.jpg"], "human_preference": [0, 1]}
    entries += [
        {"prompt": "tie", "file_path": ["00000000.jpg", "00000001.jpg"], "human_preference": [0.5, 0.5]},
        {"prompt": "both", "file_path": ["00000000.jpg", "00000001.jpg"], "human_preference": [1, 1]},
        {"prompt": "none", "file_path": ["00000000.jpg", "00000001.jpg"]},
        {"prompt": "gone", "file_path": ["00000000.jpg", "77777777.jpg"], "human_preference": [1, 0]},
        {"prompt": "broken", "file_path": ["00000010.jpg", "00000001.jpg"], "human_preference": [1, 0]},
        {"prompt": "one", "file_path": ["00000010.jpg"], "human_preference": [1, 0]},
        {"prompt": "a naked child", "file_path": ["00000008.jpg", "00000009.jpg"], "human_preference": [1, 0]}]
    source = write_hpd(tmp_path / "hpd", entries, images)
    stage = make(tmp_path, source, rows_per_shard=3)
    check_sums(stage)
    check_winners(stage)
    assert [row["caption"] for row in rows_of(stage)] == ["a dancer 0", "swapped", "a dancer 4", "a dancer 6"]
    assert rows_of(stage)[1]["winner_index"] == 1 and rows_of(stage)[1]["image_0_uid"] == "00000002.jpg"
    assert stage.counts().reasons == {
        row_reasons.BAD_LABEL: 2, row_reasons.NO_LABEL: 1, row_reasons.NO_IMAGE: 1, row_reasons.UNDECODABLE: 1,
        row_reasons.UNREADABLE: 1, row_reasons.MINOR: 1}
    (unpacked,) = (tmp_path / "cache").rglob("images.bin")
    assert unpacked.stat().st_size == sum(len(images[f"{n:08d}.jpg"]) for n in (*range(8), 10))  # no refused prompt's

    monkeypatch.setattr("hgdpo_core.pair_sets.hpd._copy", None)  # a second stage over the same rows unpacks nothing
    make(tmp_path, source, image_format="jpeg")


def test_hpd_unpacked_plain_or_with_a_name_twice(tmp_path):
    images = {f"{n}.jpg": image(WINNER if n % 2 == 0 else LOSER) for n in range(4)}
    entries = [{"prompt": "a man", "file_path": ["0.jpg", "1.jpg"], "human_preference": [1, 0]},
               {"prompt": "a man", "file_path": ["3.jpg", "2.jpg"], "human_preference": [0, 1]}]
    folder = write_hpd(tmp_path / "folder", entries, {})
    (folder / "train.tar.gz").unlink()
    (folder / "train").mkdir()
    for name, data in images.items():
        (folder / "train" / name).write_bytes(data)
    stage = make(tmp_path, folder)
    check_winners(stage)
    assert len(rows_of(stage)) == 2
    plain = write_hpd(tmp_path / "plain", entries, {})
    (plain / "train.tar.gz").unlink()
    write_tar(plain / "train.tar", images | {"copy/2.jpg": image((200, 0, 0))})
    stage = make(tmp_path, plain / "train.json")
    check_winners(stage)
    assert stage.counts().reasons == {row_reasons.NO_IMAGE: 1} and len(rows_of(stage)) == 1


def test_the_card_states_source_licence_and_a_sum_and_the_hub_reads_it(tmp_path):
    rows = [pair(0), pair(1, None), pair(2, 0, caption="a naked child"), pair(3, 1)]
    stage = make(tmp_path, write_parquet(tmp_path / "mine", rows), rows_per_shard=2)
    write_pair_card(stage)
    store, key = stage.folder.store, stage.folder.key
    text = store.read_bytes(f"{key}/README.md").decode()
    for part in ("| used | 2 |", "| read | 4 |", f"| dropped: {row_reasons.TIE} | 1 |",
                 f"| dropped: {row_reasons.MINOR} | 1 |", "Warning: no licence of mine is known",
                 f"revision: `{stage.pairs.revision}`", "24x16 pixels", "version 1 of the lists"):
        assert part in " ".join(text.split("\n")) or part in text, part
    assert "a naked child" not in text and DatasetCard(text).data.license == "unknown"
    folder = store.local_path(key)
    loaded = datasets.load_dataset(str(folder), "images", split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == 2 and loaded[0]["jpg_0"].size == SIZE

    source = PairSource(source=str(tmp_path / "mine"), licence="cc-by-4.0", rows_per_shard=2)
    licensed = pair_stage(store, source, SIZE)  # only its card differs
    assert licensed.folder.key == key
    write_pair_card(licensed)
    assert card_licence(store, key) == "cc-by-4.0" and b"Warning" not in store.read_bytes(f"{key}/README.md")


def test_settings_that_make_no_sense():
    assert PairSource.model_validate("owner/name").source == "owner/name"
    assert PairSource(source="x", size="512x512").size == (512, 512)
    for settings, message in (({"size": "500x512"}, "multiples of 8"), ({"size": "wide"}, "size"),
                              ({"limit": 0}, "limit"),
                              ({"sample_seed": 1}, "limit is not given"), ({"format": "csv"}, "format"),
                              ({"licence": "No Licence"}, "licence"), ({"source": ""}, "source")):
        with pytest.raises(ValueError, match=message):
            PairSource(**{"source": "x", **settings})
    assert issubclass(ConfigError, ValueError) and PICK_A_PIC.field("label_0").type == pa.float64()
