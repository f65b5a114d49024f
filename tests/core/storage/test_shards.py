"""A shard exists or it does not: whatever is killed, truncated, changed or written twice."""

import json

import numpy as np
import pyarrow as pa
import pytest
from faulty_s3 import served_bucket

from hgdpo_core.errors import ConfigError, CorruptShardError, InputError, StorageError
from hgdpo_core.storage import Store
from hgdpo_core.storage.local import LocalFiles
from hgdpo_core.storage.shards import InputShard, ShardFolder, read_table, write_table

CONFIG = {"sampler": {"steps": 50, "size": (704, 1024)}, "seed": 0}
KEY = "pools/pool-1"


def some_table(seed=0, rows=6):
    random = np.random.default_rng(seed)
    return pa.table({
        "prompt": [f"prompt {index // 2}" for index in range(rows)],
        "seed": pa.array(random.integers(0, 2**63, rows), pa.int64()),
        "image": pa.array([random.bytes(3000) for _ in range(rows)], pa.binary()),
        "score": pa.array(random.standard_normal(rows), pa.float32()),
        "latents": pa.array([random.standard_normal(4).astype("float16") for _ in range(rows)],
                            pa.list_(pa.float16(), 4)),
        "reason": pa.array([None, "", *["x"] * (rows - 2)], pa.string()),
    })


@pytest.fixture(scope="module")
def bucket():
    with served_bucket():
        yield "s3://bucket"


@pytest.fixture
def s3_store(bucket, tmp_path):
    return Store(f"{bucket}/{tmp_path.name}")


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    return Store(str(tmp_path)) if request.param == "local" else request.getfixturevalue("s3_store")


@pytest.fixture
def folder(store):
    return ShardFolder.create(store, KEY, CONFIG)


def manifest_key(index=0):
    return f"{KEY}/shard-{index:05d}.json"


def test_a_table_round_trips_exactly_and_its_manifest_is_complete(folder):
    table, inputs = some_table(), [InputShard(key="prompts/x/shard-00000-0.parquet", sha256="ab")]
    manifest = folder.commit(0, table, inputs=inputs, device="cuda", batch_size=8, seconds=1.5,
                             details={"prompts": ["ü"]})
    read = folder.read(0)
    assert read.equals(table, check_metadata=True)
    assert folder.find(0) == folder.manifests()[0] == manifest
    assert manifest.file == f"shard-00000-{manifest.sha256[:12]}.parquet"
    assert (manifest.rows, manifest.device, manifest.batch_size, manifest.seconds) == (6, "cuda", 8, 1.5)
    assert manifest.bytes == folder.store.size(f"{KEY}/{manifest.file}")
    assert manifest.inputs == tuple(inputs) and manifest.details == {"prompts": ["ü"]}
    assert manifest.columns["image"] == "binary" and manifest.columns["latents"].startswith("fixed_size_list")
    assert manifest.libraries["pyarrow"] == pa.__version__ and "torch" in manifest.libraries
    assert folder.input_shard(0) == InputShard(key=f"{KEY}/{manifest.file}", sha256=manifest.sha256)


def test_columns(folder):
    table = some_table()
    folder.commit(0, table)
    assert folder.read(0, ["score", "seed"]).equals(table.select(["score", "seed"]))
    assert folder.read_columns(0, ["seed"]).equals(table.select(["seed"]))
    for read in (folder.read, folder.read_columns):
        with pytest.raises(InputError, match="no column colour; it has prompt, seed"):
            read(0, ["colour"])


def test_a_folder_keeps_its_config(store, folder):
    assert ShardFolder.create(store, KEY, CONFIG).config_hash == folder.config_hash
    opened = ShardFolder.open(store, KEY)
    assert opened.config == {"sampler": {"steps": 50, "size": [704, 1024]}, "seed": 0}
    with pytest.raises(ConfigError, match=r"pool-1.*sampler\.steps is 50 there, 20 now"):
        ShardFolder.create(store, KEY, {"sampler": {"steps": 20, "size": (704, 1024)}, "seed": 0})
    with pytest.raises(StorageError, match="no readable config.json"):
        ShardFolder.open(store, "pools/other")


def test_a_growing_prompt_list_finds_its_shards_again(store):
    ShardFolder.create(store, KEY, CONFIG | {"expected": {"shards": 1}}).commit(0, some_table())
    grown = ShardFolder.create(store, KEY, CONFIG | {"expected": {"shards": 3}})
    assert ShardFolder.open(store, KEY).config["expected"] == {"shards": 3}
    assert grown.completed(range(3)) == {0}


def test_a_crash_between_data_and_manifest_leaves_no_shard(folder, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "write_json", crash)
    with pytest.raises(KeyboardInterrupt):
        folder.commit(0, some_table())
    monkeypatch.undo()
    assert folder.manifests() == {} and folder.find(0) is None
    assert len(folder.store.list(KEY)) == 2       # config.json and the data


def test_rewriting_the_same_data_does_not_touch_its_file(folder, monkeypatch):
    manifest = folder.commit(0, some_table())
    folder.store.delete(manifest_key())
    written = []
    write = Store.write_bytes
    monkeypatch.setattr(Store, "write_bytes",
                        lambda self, key, data: (written.append(key), write(self, key, data)))
    assert folder.commit(0, some_table()).file == manifest.file
    assert written == [manifest_key()]


def test_a_manifest_that_is_not_right_is_no_shard(folder):
    folder.commit(0, some_table())
    text = folder.store.read_bytes(manifest_key())
    changes = [{"format_version": 2}, {"config_hash": "0" * 12}, {"index": 1}, {"file": "../../config.json"},
               {"colour": "red"}]
    broken = [json.dumps(json.loads(text) | change).encode() for change in changes]
    for damaged in [text[:len(text) // 2], b"", b"\xff\xfe", *broken]:
        folder.store.write_bytes(manifest_key(), damaged)
        assert folder.find(0) is None and folder.manifests() == {}, damaged
    folder.commit(0, some_table())
    assert folder.completed([0, 1]) == {0}


@pytest.mark.parametrize("size", [10, None])
def test_a_data_file_of_the_wrong_size_is_no_shard(folder, size):
    manifest = folder.commit(0, some_table())
    if size is None:
        folder.store.delete(f"{KEY}/{manifest.file}")
    else:
        folder.store.write_bytes(f"{KEY}/{manifest.file}", b"x" * size)
    assert folder.find(0) is None and folder.manifests() == {}
    with pytest.raises(StorageError, match="shard 0 .* does not exist"):
        folder.read(0)
    folder.commit(0, some_table())
    assert folder.read(0).equals(some_table())


def test_wrong_bytes_are_quarantined_and_made_again(folder):
    manifest = folder.commit(0, some_table())
    data_key = f"{KEY}/{manifest.file}"
    folder.store.write_bytes(data_key, b"x" * manifest.bytes)
    with pytest.raises(CorruptShardError, match="the next run makes this shard again") as caught:
        folder.read(0)
    assert manifest.file in str(caught.value) and "shard-00000.json" in str(caught.value)
    assert sorted(name.partition("-")[2] for name in folder.store.list(f"{KEY}/quarantine")) == [
        manifest.file, "shard-00000.json"]
    assert folder.manifests() == {} and folder.store.list(KEY).keys() == {"config.json"}
    folder.commit(0, some_table())
    assert folder.read(0).equals(some_table())


def test_one_bad_read_is_not_taken_for_a_bad_file(folder, monkeypatch):
    folder.commit(0, some_table())
    read, calls = Store.read_bytes, []

    def spoil_once(self, key, **known):
        calls.append(key)
        return read(self, key)[:-1] + (b"?" if len(calls) == 1 else read(self, key)[-1:])

    monkeypatch.setattr(Store, "read_bytes", spoil_once)
    assert folder.read(0).equals(some_table()) and len(calls) == 2


def test_a_shard_made_from_other_inputs_does_not_exist(folder):
    first, second = [InputShard(key="a", sha256="1")], [InputShard(key="a", sha256="2")]
    made = folder.commit(0, some_table(0), inputs=first)
    assert folder.find(0, first) == folder.find(0) == made
    assert folder.find(0, second) is None and folder.find(0, []) is None
    remade = folder.commit(0, some_table(1), inputs=second)
    assert folder.find(0, second) == remade and folder.find(0, first) is None
    assert folder.read(0).equals(some_table(1))


def test_the_second_of_two_writers_yields(store, folder):
    other = ShardFolder.open(Store(store.root), KEY)
    assert other.manifests() == {}
    first = folder.commit(0, some_table(0))
    assert other.find(0) == first                   # another client sees it at once
    assert other.commit(0, some_table(1)) == first  # content differs, as between two kinds of GPU
    assert folder.read(0).equals(other.read(0)) and folder.read(0).equals(some_table(0))


def test_of_two_racing_writers_either_is_valid(store, folder, monkeypatch):
    """The other writer's manifest arrives after our last look and before our own PUT."""
    other, write = ShardFolder.open(Store(store.root), KEY), Store.write_json

    def race(self, key, value):
        monkeypatch.setattr(Store, "write_json", write)
        other.commit(0, some_table(1))
        write(self, key, value)

    monkeypatch.setattr(Store, "write_json", race)
    ours = folder.commit(0, some_table(0))
    assert ours == folder.find(0) == other.find(0) and other.read(0).equals(some_table(0))


def test_rejected_rows_are_kept_and_counted(folder):
    assert folder.rejected() == {}
    folder.reject("shard-00000", some_table(rows=3))
    folder.reject("shard-00000", some_table(rows=4))
    folder.reject("shard-00001", some_table(rows=2))
    assert folder.rejected() == {"shard-00000": 4, "shard-00001": 2}
    assert read_table(folder.store, f"{KEY}/rejected/shard-00000.parquet").equals(some_table(rows=4))
    assert folder.manifests() == {}


def test_single_tables(store):
    write_table(store, "prompts/p-1/prompts.parquet", some_table())
    assert read_table(store, "prompts/p-1/prompts.parquet").equals(some_table())
    empty = some_table().slice(0, 0)
    write_table(store, "prompts/p-1/prompts.parquet", empty)
    assert read_table(store, "prompts/p-1/prompts.parquet", ["seed"]).equals(empty.select(["seed"]))
    store.write_bytes("prompts/p-1/broken.parquet", b"PAR1 no")
    with pytest.raises(StorageError, match="broken.parquet is not a readable Parquet file"):
        read_table(store, "prompts/p-1/broken.parquet")


def test_manifests_of_a_folder_cost_one_list(tmp_path, monkeypatch):
    folder = ShardFolder.create(Store(str(tmp_path)), KEY, CONFIG)
    for index in range(7):
        folder.commit(index, some_table(index))
    calls = {"list": 0, "size": 0}
    entries, size = LocalFiles.entries, Store.size
    monkeypatch.setattr(LocalFiles, "entries", lambda *a: (calls.update(list=calls["list"] + 1), entries(*a))[1])
    monkeypatch.setattr(Store, "size", lambda *a: (calls.update(size=calls["size"] + 1), size(*a))[1])
    assert list(folder.manifests()) == list(range(7)) and calls == {"list": 1, "size": 0}


def test_manifests_of_a_folder_cost_one_list_on_s3(s3_store, monkeypatch):
    folder = ShardFolder.create(s3_store, KEY, CONFIG)
    for index in range(7):
        folder.commit(index, some_table(index))
    requests = []
    call = type(s3_store._objects.filesystem)._call_s3

    async def record(self, method, *args, **kwargs):
        requests.append(method)
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(type(s3_store._objects.filesystem), "_call_s3", record)
    assert list(folder.manifests()) == list(range(7))
    assert sorted(requests) == ["get_object"] * 7 + ["list_objects_v2"]
