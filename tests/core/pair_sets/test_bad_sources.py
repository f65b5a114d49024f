"""Sources that cannot be used: one clear line each, before anything is written."""

import json
import sys

import fsspec
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from pair_files import LOSER, WINNER, image, pair, pair_stage, write_hpd, write_parquet, write_tar

from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.errors import HGDPOError, InputError, StorageError
from hgdpo_core.pair_sets import files as pair_files_module
from hgdpo_core.pair_sets import open_pair_set
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.pair_sets import PairSetStage, write_pair_card
from hgdpo_core.storage import Store

ENTRY = {"prompt": "a man", "file_path": ["0.jpg", "1.jpg"], "human_preference": [1, 0]}


def refusal(source, **settings) -> str:
    with pytest.raises(HGDPOError) as error:
        open_pair_set(PairSource(source=str(source), **settings))
    message = str(error.value)
    assert message.startswith(("pairs: ", "the address")) and "\n" not in message and len(message) < 700
    return message


def test_missing_columns_are_named(tmp_path):
    rows = [pair(0)]
    for missing, expected in (("label_0", "no column label_0"), ("caption", "no column caption"),
                              ("jpg_1", "no column jpg_1: expected caption, label_0, jpg_0, jpg_1")):
        table = pa.Table.from_pylist([{name: value for name, value in row.items() if name != missing} for row in rows])
        pq.write_table(table, tmp_path / f"{missing}.parquet")
        assert expected in refusal(tmp_path / f"{missing}.parquet")
    without = pa.Table.from_pylist([{name: value for name, value in rows[0].items() if not name.startswith("jpg")}])
    pq.write_table(without, tmp_path / "no-images.parquet")
    assert "a copy without images" in refusal(tmp_path / "no-images.parquet")
    pq.write_table(pa.Table.from_pylist([pair(0, jpg_0="a", jpg_1="b")]), tmp_path / "text.parquet")
    assert "expected bytes, got string" in refusal(tmp_path / "text.parquet")


def test_what_is_empty_absent_or_of_no_known_form(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "nothing at" in refusal(tmp_path / "empty")
    assert "nothing at" in refusal(tmp_path / "absent") and "nothing at" in refusal("./absent/pairs")
    write_parquet(tmp_path / "none", [])
    assert "holds no pair" in refusal(tmp_path / "none")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    assert "holds no pairs: expected .parquet" in refusal(tmp_path / "text")
    assert "holds no .tar file, but format is tars" in refusal(tmp_path / "text", format="tars")
    write_parquet(tmp_path / "both", [pair(0)])
    write_tar(tmp_path / "both" / "a.tar", {"0.jpg": b""})
    assert "several forms, parquet, tars: name one in format" in refusal(tmp_path / "both")
    assert "holds no pair: expected samples" in refusal(tmp_path / "both", format="tars")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    assert "no Parquet file" in refusal(tmp_path / "broken.parquet")
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    assert "not a tar file" in refusal(tmp_path / "broken.tar")


def test_addresses_that_cannot_be_listed_or_hold_secrets(tmp_path):
    assert "cannot be listed over http" in refusal("https://example.com/pairs.parquet")
    secret = refusal("s3://key:word@bucket/pairs")
    assert "password" in secret and "word@" not in secret
    assert "revision main names a commit of the hub" in refusal(tmp_path, revision="main")


def test_lists_that_are_none(tmp_path):
    for name, text, expected in (
            ("object", json.dumps(ENTRY), "not a JSON list"), ("cut", json.dumps([ENTRY])[:-1], "does not end"),
            ("syntax", "[{]", "is not JSON"), ("other", json.dumps([{"a": 1}]), "entry 0 of"),
            ("empty", "[]", "no pair")):
        folder = write_hpd(tmp_path / name, [ENTRY], {"0.jpg": b""})
        (folder / "train.json").write_text(text)
        assert expected in refusal(folder)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "train.json").write_text(json.dumps([ENTRY]))
    assert "neither train.tar.gz nor image files" in refusal(tmp_path / "alone")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a"}\n')
    assert "line 1 of" in refusal(tmp_path / "lines.jsonl")
    (tmp_path / "lines.jsonl").write_text("{\n")
    with pytest.raises(InputError, match="line 1 of .* is not JSON"):
        open_pair_set(PairSource(source=str(tmp_path / "lines.jsonl")))


def test_a_cut_archive_and_a_small_disk_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_hpd(tmp_path / "hpd", [ENTRY], {"0.jpg": image(WINNER), "1.jpg": image(LOSER)})
    stage = pair_stage(Store(str(tmp_path / "root")), PairSource(source=str(folder)), (16, 16))
    with monkeypatch.context() as patch:
        patch.setattr("hgdpo_core.pair_sets.hpd.MARGIN_BYTES", 1 << 60)
        with pytest.raises(StorageError, match="GB of images are unpacked into .* free some space"):
            stage.make(Worker("cpu"))
    archive = (folder / "train.tar.gz").read_bytes()
    (folder / "train.tar.gz").write_bytes(archive[:len(archive) // 2])
    with pytest.raises(InputError, match="cut off or not a tar file"):
        stage.make(Worker("cpu"))
    (folder / "train.tar.gz").write_bytes(archive)
    assert stage.make(Worker("cpu")) == 1 and stage.counts().triplets == 1


def test_one_class_of_labels_is_warned_of_and_ties_alone_are_no_data_set(tmp_path):
    """Winners sorted first, as in our own triplets, are one class too: so they are used."""
    store = Store(str(tmp_path / "root"))
    for name, winner, wins in (("first", 0, 16), ("second", 1, 16), ("few", 0, 15)):
        one_class = write_parquet(tmp_path / name, [pair(number, winner) for number in range(wins)])
        stage = pair_stage(store, PairSource(source=str(one_class)), (16, 16))
        stage.make(Worker("cpu"))
        stage.refuse_if_empty()
        write_pair_card(stage)
        card = store.read_bytes(f"{stage.folder.key}/README.md").decode()
        said = f"the {name} image wins in all 16 pairs"
        assert (said in stage.counts().warning) == (said in card) == (wins == 16)
    both = write_parquet(tmp_path / "both", [pair(number, int(number == 3)) for number in range(16)])
    stage = pair_stage(store, PairSource(source=str(both)), (16, 16))
    stage.make(Worker("cpu"))
    assert not stage.counts().warning and stage.counts().first_won == 15
    ties = write_parquet(tmp_path / "ties", [pair(number, None) for number in range(3)])
    stage = pair_stage(store, PairSource(source=str(ties)), (16, 16))
    stage.refuse_if_empty()  # nothing is made yet
    stage.make(Worker("cpu"))
    with pytest.raises(InputError, match=r"none of the 3 pairs of ties can be used \(it is a tie: 3\)"):
        stage.refuse_if_empty()
    write_pair_card(stage)
    assert b"| used | 0 |" in store.read_bytes(f"{stage.folder.key}/README.md").replace(b"  ", b" ")


# -- the hub


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/api/datasets/owner/pairs"))


class FakeHub:
    """In place of HfApi: one data set of a commit, or an error."""

    error: Exception | None = None
    gate: Exception | None = None
    licence: object = "apache-2.0"
    asked: list = []

    def dataset_info(self, name, revision=None, timeout=None):
        self.asked.append((name, revision))
        if self.error:
            raise self.error
        return type("Info", (), {"sha": "c0ffee", "gated": "manual" if self.gate else False,
                                 "card_data": None if self.licence is None else {"license": self.licence}})

    def auth_check(self, name, repo_type):
        assert repo_type == "dataset" and self.gate
        raise self.gate


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(pair_files_module, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "asked", [])
    return FakeHub


@pytest.mark.parametrize(("error", "kind", "expected"), [
    (OfflineModeIsEnabled("offline mode is on"), StorageError, "the hub is not available: offline mode is on"),
    (httpx.ConnectError("no route"), StorageError, "no route; without the network, give the path of a copy"),
    (RepositoryNotFoundError("404", response=answer(404)), InputError, "no such data set on the hub"),
    (RevisionNotFoundError("404", response=answer(404)), InputError, "no revision v9"),
    (GatedRepoError("403", response=answer(403)), InputError, "gated on the hub: accept its conditions"),
])
def test_hub_ids_out_of_reach_are_one_line(hub, monkeypatch, error, kind, expected):
    monkeypatch.setattr(hub, "error", error)
    with pytest.raises(kind, match=expected):
        open_pair_set(PairSource(source="owner/pairs", revision="v9"))
    assert expected in refusal("owner/pairs", revision="v9")


def test_a_gated_one_is_refused_before_its_files_are_listed(hub, monkeypatch):
    monkeypatch.setattr(hub, "gate", GatedRepoError("403", response=answer(403)))
    assert "owner/pairs is gated" in refusal("owner/pairs")


def test_a_data_set_of_the_hub_is_read_at_its_commit(hub, monkeypatch, tmp_path):
    write_parquet(tmp_path / "hub" / "owner" / "pairs@c0ffee", [pair(n, n % 2) for n in range(5)], files=2)
    (tmp_path / "hub" / "owner" / "pairs@c0ffee" / "README.md").write_text("card")

    class HubFiles(LocalFileSystem):
        """`hf://datasets/…` in a folder."""

        protocol = "hf"

        def __init__(self, *args, block_size=None, **options):
            assert block_size == 2**14
            super().__init__(*args, **options)

        @classmethod
        def _strip_protocol(cls, path):
            return str(path).replace("hf://datasets", str(tmp_path / "hub"))

    fsspec.register_implementation("hf", HubFiles, clobber=True)
    try:
        stage = pair_stage(Store(str(tmp_path / "root")), PairSource(source="owner/pairs"), (16, 16))
        assert stage.make(Worker("cpu")) == 5 and stage.pairs.licence == "apache-2.0"
        assert stage.folder.read(0)["model_fingerprint"][0].as_py() == "foreign:owner/pairs@c0ffee"
        assert stage.folder.key.startswith("triplets/pairs-")
        write_pair_card(stage)
        text = stage.folder.store.read_bytes(f"{stage.folder.key}/README.md").decode()
        assert "[owner/pairs](https://huggingface.co/datasets/owner/pairs)" in text and "Warning" not in text
        again = PairSetStage.open(stage.folder, stage.recipe(), [0])  # asks for the commit, not for what moved since
        assert hub.asked[-1] == ("owner/pairs", "c0ffee") and again.find_missing() == []
        monkeypatch.setattr(hub, "licence", None)
        assert open_pair_set(PairSource(source="owner/pairs")).licence == "unknown"
        monkeypatch.setattr(hub, "licence", ["mit", "other"])
        assert open_pair_set(PairSource(source="owner/pairs")).licence == "mit"
    finally:
        sys.modules["fsspec.registry"]._registry.pop("hf", None)  # fsspec.registry is a view of it
