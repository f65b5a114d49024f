"""Clean-up takes what nothing names, and only after its time."""

import os
import re
import time
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from faulty_s3 import served_bucket

from hgdpo_core.errors import ConfigError
from hgdpo_core.storage import Store
from hgdpo_core.storage.garbage import collect_garbage
from hgdpo_core.storage.shards import ShardFolder

KEY = "pools/pool-1"
HOUR = 3600
LEFTOVER = f"{KEY}/.tmp-0123456789abcdef0123456789abcdef"


def some_table(seed):
    return pa.table({"seed": [seed, seed + 1]})


@pytest.fixture
def folder(tmp_path):
    """Shard 0 committed, an unnamed older file of it, rejected and quarantined tables, a temporary file."""
    folder = ShardFolder.create(Store(str(tmp_path)), KEY, {"seed": 0})
    folder.commit(0, some_table(10))
    folder.store.delete(f"{KEY}/shard-00000.json")
    folder.commit(0, some_table(0))
    folder.reject("shard-00000", some_table(1))
    folder.store.write_bytes(f"{KEY}/quarantine/20250101T000000Z-shard-00000-0123456789ab.parquet", b"bad")
    folder.store.write_bytes("models/m-1/weights.safetensors", b"weights")
    folder.store.write_bytes(LEFTOVER, b"half")
    return folder


def age(store, seconds):
    moment = time.time() - seconds
    for key, _, _ in store.walk():
        os.utime(store.local_path(key), (moment, moment))


def unnamed(folder):
    kept = folder.find(0).file
    return [f"{KEY}/{name}" for name in folder.store.list(KEY) if name.endswith(".parquet") and name != kept]


def test_nothing_young_is_touched(folder):
    report = collect_garbage(folder.store)
    assert report.files == () and report.bytes == 0 and report.problems == () and report.kept_folders == ()


def test_a_dry_run_lists_what_a_real_run_removes(folder):
    store = folder.store
    age(store, 25 * HOUR)
    before, expected = {key for key, _, _ in store.walk()}, {LEFTOVER, *unnamed(folder)}
    dry = collect_garbage(store, dry_run=True)
    assert set(dry.files) == expected and len(expected) == 2 and dry.dry_run
    assert {key for key, _, _ in store.walk()} == before
    real = collect_garbage(store)
    assert real.files == dry.files and real.bytes == dry.bytes > 0
    assert {key for key, _, _ in store.walk()} == before - expected
    assert folder.read(0).equals(some_table(0))
    assert collect_garbage(store).files == ()


def test_the_age_is_a_setting(folder):
    age(folder.store, 2 * HOUR)
    assert collect_garbage(folder.store, dry_run=True).files == ()
    assert len(collect_garbage(folder.store, older_than_seconds=HOUR, dry_run=True).files) == 2


def test_an_unreadable_manifest_protects_its_folder(folder):
    folder.store.write_bytes(f"{KEY}/shard-00000.json", b'{"file": "shard-')
    age(folder.store, 25 * HOUR)
    report = collect_garbage(folder.store)
    assert report.kept_folders == (KEY,) and report.files == (LEFTOVER,)


def test_the_manifest_of_a_newer_version_protects_its_data(folder):
    named = unnamed(folder)[0]
    manifest = {"format_version": 99, "file": named.rpartition("/")[2]}
    folder.store.write_json(f"{KEY}/shard-00001.json", manifest)
    age(folder.store, 25 * HOUR)
    assert named not in collect_garbage(folder.store).files


def test_a_file_named_since_the_listing_is_spared(folder, monkeypatch):
    """A writer of the same content takes an old unnamed file for its own while we clean up."""
    age(folder.store, 25 * HOUR)
    old, named = unnamed(folder)[0], folder.store.read_json(f"{KEY}/shard-00000.json")
    read_many = Store.read_many

    def commit_after_reading(self, keys):
        found = read_many(self, keys)
        self.write_json(f"{KEY}/shard-00000.json", named | {"file": old.rpartition("/")[2]})
        return found

    monkeypatch.setattr(Store, "read_many", commit_after_reading)
    report = collect_garbage(folder.store)
    assert old not in report.files and folder.store.exists(old)


def test_strangers_files_are_never_removed(folder, tmp_path):
    store = folder.store
    strangers = ["work/.tmp-0123456789abcdef0123456789abcdef", "shard-00000-0123456789ab.parquet", "pools/.tmp-mine",
                 "data/shard-00000-0123456789ab.parquet"]
    for key in strangers:
        store.write_bytes(key, b"theirs")
    age(store, 25 * HOUR)
    expected = {LEFTOVER, *unnamed(folder)}
    assert set(collect_garbage(store).files) == expected
    assert all(store.exists(key) for key in strangers)


def test_a_folder_that_is_no_root_is_refused(tmp_path):
    other = Store(str(tmp_path / "home"))
    for key in ("data/shard-00000-0123456789ab.parquet", "models/bert/config.json", "a/.tmp-1"):
        other.write_bytes(key, b"theirs")
    age(other, 25 * HOUR)
    with pytest.raises(ConfigError, match="is not a root of this project: .* nothing in it was touched"):
        collect_garbage(other)
    assert len(list(other.walk())) == 3


def test_an_empty_or_missing_root_is_clean(tmp_path):
    assert collect_garbage(Store(str(tmp_path / "nothing"))).files == ()


@pytest.fixture(scope="module")
def server():
    with served_bucket("garbage") as server:
        yield server


def test_unnamed_data_and_unfinished_uploads_on_s3(server):
    server.behave()
    store = Store("s3://garbage/root")
    client = store._objects.filesystem
    for key in ("root/pools/x", "elsewhere/x"):
        client.call_s3("create_multipart_upload", Bucket="garbage", Key=key)
    folder = ShardFolder.create(store, KEY, {"seed": 0})
    folder.commit(0, some_table(10))
    store.delete(f"{KEY}/shard-00000.json")
    folder.commit(0, some_table(0))
    # moto dates every upload 2010, so an upload is old whatever the limit; the objects are seconds old
    fresh = collect_garbage(store, dry_run=True)
    assert fresh.files == () and fresh.uploads == ("pools/x",)
    expected = tuple(unnamed(folder))
    report = collect_garbage(store, older_than_seconds=-60)
    assert report.files == expected and len(expected) == 1 and report.uploads == ("pools/x",)
    assert folder.read(0).equals(some_table(0)) and unnamed(folder) == []
    left = client.call_s3("list_multipart_uploads", Bucket="garbage")["Uploads"]
    assert [upload["Key"] for upload in left] == ["elsewhere/x"]    # not ours: outside the root


def test_a_young_upload_is_somebody_at_work(server):
    server.behave()
    store = Store("s3://garbage/young")
    store.write_json("runs/figures-0123456789ab/config.json", {})
    upload = store._objects.start_upload("models/large")
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    server.rewrite = lambda body: re.sub(b"<Initiated>.*?</Initiated>",
                                         b"<Initiated>%s</Initiated>" % hour_ago.isoformat().encode(), body)
    assert collect_garbage(store).uploads == () and len(list(store.unfinished_uploads())) == 1
    part = store._objects.send_part("models/large", upload, 1, b"data")
    store._objects.finish_upload("models/large", upload, [part])
    assert store.read_bytes("models/large") == b"data"
    store._objects.start_upload("models/large")
    assert collect_garbage(store, older_than_seconds=HOUR / 2).uploads == ("models/large",)
    assert list(store.unfinished_uploads()) == []


def test_a_server_that_may_not_list_uploads_still_gets_its_files_removed(server):
    server.behave()
    store = Store("s3://garbage/may-not")
    store.write_json("runs/figures-0123456789ab/config.json", {})
    store.write_bytes(LEFTOVER, b"half")
    server.refuse_all = (501, "NotImplemented")
    server.only_refuse = "uploads"
    report = collect_garbage(store, older_than_seconds=-60)
    assert report.files == (LEFTOVER,)
    assert len(report.problems) == 1 and report.problems[0].startswith("unfinished uploads were not all ended")
