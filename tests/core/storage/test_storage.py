"""The store keeps its promises on a local folder and on S3 (moto's server)."""

import errno
import multiprocessing
import os
import pickle
import random
from pathlib import Path

import pytest
from faulty_s3 import served_bucket

from hgdpo_core.errors import ConfigError, StorageError
from hgdpo_core.storage import MissingKeyError, Store


@pytest.fixture(scope="module")
def server():
    with served_bucket() as server:
        yield server


@pytest.fixture
def s3_root(server, tmp_path):
    return f"s3://bucket/some/{tmp_path.name}"


@pytest.fixture(params=["local", "s3", "memory"])
def store(request, tmp_path):
    if request.param == "s3":
        return Store(request.getfixturevalue("s3_root"))
    return Store(str(tmp_path / "root") if request.param == "local" else f"memory://{tmp_path.name}")


# -- the same behaviour everywhere


def test_objects_round_trip(store):
    store.write_bytes("a/b/data.bin", b"\x00\xff" * 1000)
    store.write_json("a/value.json", {"b": [1, None], "a": "ü"})
    assert store.read_bytes("a/b/data.bin") == b"\x00\xff" * 1000
    assert store.read_json("a/value.json") == {"a": "ü", "b": [1, None]}
    assert store.read_bytes("a/value.json") == '{\n "a": "ü",\n "b": [\n  1,\n  null\n ]\n}\n'.encode()
    store.write_bytes("empty", b"")
    assert store.read_bytes("empty") == b"" and store.size("empty") == 0
    assert store.exists("a/value.json") and not store.exists("a/b") and not store.exists("a/other.json")


def test_lists_and_walks(store):
    assert store.list("nothing/here") == {} and store.list_folders("nothing/here") == []
    for key in ("a/one", "a/three", "a/b/two", "ab/four"):
        store.write_bytes(key, key.encode())
    assert store.list("a") == {"one": 5, "three": 7}
    assert store.list_folders("a") == ["b"] and store.list_folders() == ["a", "ab"]
    walked = {key: size for key, size, changed in store.walk("a") if changed > 1e9}
    assert walked == {"a/one": 5, "a/three": 7, "a/b/two": 7}
    assert len(list(store.walk())) == 4


def test_missing_keys_are_named_or_left_out(store):
    store.write_bytes("a/here", b"1")
    assert store.read_many(["a/here", "a/gone"]) == {"a/here": b"1"}
    for read in (store.read_bytes, store.read_json, store.open):
        with pytest.raises(MissingKeyError, match="a/gone"):
            read("a/gone")
    with pytest.raises(MissingKeyError, match="a/gone"):
        store.move("a/gone", "b/gone")
    with pytest.raises(MissingKeyError, match="nowhere"):
        store.get_folder("nowhere", Path("unused"))
    store.delete("a/gone")


def test_moves_and_deletes(store):
    store.write_bytes("a/x", b"1")
    store.move("a/x", "c/d/y")
    assert not store.exists("a/x") and store.read_bytes("c/d/y") == b"1"
    store.delete("c/d/y")
    assert store.list("c/d") == {}


def test_folders_round_trip(store, tmp_path):
    (tmp_path / "model/unet").mkdir(parents=True)
    (tmp_path / "model/index.json").write_bytes(b"{}")
    (tmp_path / "model/unet/weights").write_bytes(bytes(range(256)))
    store.put_folder(tmp_path / "model", "models/one")
    store.get_folder("models/one", tmp_path / "copy")
    copied = {path.relative_to(tmp_path / "copy").as_posix(): path.read_bytes()
              for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert copied == {"index.json": b"{}", "unet/weights": bytes(range(256))}


def test_large_objects_are_read_in_ranges(store, monkeypatch, tmp_path):
    monkeypatch.setattr("hgdpo_core.storage.store.CHUNK_BYTES", 1000)
    data = random.Random(0).randbytes(3500)
    store.write_bytes("models/large", data)
    assert store.read_bytes("models/large") == data
    store.get_folder("models", tmp_path / "models")
    assert (tmp_path / "models/large").read_bytes() == data
    with store.open("models/large") as file:
        file.seek(-100, os.SEEK_END)
        assert file.read() == data[-100:]
        file.seek(17)
        assert file.read(2000) == data[17:2017]


def test_a_second_client_sees_new_objects_at_once(store):
    other = pickle.loads(pickle.dumps(store))
    assert other.root == store.root and other.list("a") == {} and not other.exists("a/new")
    store.write_bytes("a/new", b"1")
    assert other.exists("a/new") and other.list("a") == {"new": 1} and other.read_bytes("a/new") == b"1"


def test_probing_leaves_nothing(store):
    store.check_writable()
    assert list(store.walk()) == []


@pytest.mark.parametrize("key", ["/etc/passwd", "../up", "a//b", "a/./b", "a/", "a\\b"])
def test_keys_stay_inside_the_root(tmp_path, key):
    with pytest.raises(ConfigError, match="relative path"):
        Store(str(tmp_path)).write_bytes(key, b"")


# -- roots


def test_local_roots_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root in ("sub", "./sub", "file://" + str(tmp_path / "sub")):
        store = Store(root)
        assert store.root == f"file://{tmp_path}/sub" and store.local_path("a") == tmp_path / "sub/a"
        assert store.url("a/b") == f"file://{tmp_path}/sub/a/b"
    assert Store("memory://x").local_path("a") is None


@pytest.mark.parametrize("root", [
    "s3://AKIA:hunter2@bucket/x", "s3://AKIA:hun/ter2@bucket", "s3://hunter2@bucket",
    "S3://AKIA:hunter2@bucket",
    "s3://AKIA%3Ahunter2%40bucket/x", "https://host/x?X-Amz-Signature=hunter2", "sftp://me:hunter2@host/x",
    "s3://bucket/x?secret=hunter2", "s3://bucket/x?to=https://hunter2", "s3://AKIA:hun?://ter2@bucket",
])
def test_secrets_in_a_root_are_refused_and_not_echoed(root):
    with pytest.raises(ConfigError) as caught:
        Store(root)
    assert "ter2" not in str(caught.value) and "root" in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("endpoint", ["http://AKIA:hunter2@127.0.0.1:9000", "http://127.0.0.1?key=hunter2",
                                      "AKIA:hunter2@127.0.0.1:9000"])
@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_secrets_in_the_endpoint_are_refused_and_not_echoed(monkeypatch, variable, endpoint):
    monkeypatch.setenv(variable, endpoint)
    with pytest.raises(ConfigError, match="endpoint") as caught:
        Store("s3://bucket/x")
    assert "hunter2" not in str(caught.value)


def test_doubled_slashes_name_the_same_root(server):
    store = Store("s3://bucket//doubled///runs/")
    assert store.root == "s3://bucket/doubled/runs"
    store.write_bytes("d/x", b"1")
    assert store.list("d") == {"x": 1} and [key for key, *_ in store.walk()] == ["d/x"]


@pytest.mark.parametrize("root", ["", "s3://", "nosuchthing://x", "simplecache::s3://bucket", "file://data/x",
                                  "local://data"])
def test_senseless_roots_are_refused(root):
    with pytest.raises(ConfigError):
        Store(root)


def failing_with(error):
    def fail(*_, **__):
        raise error

    return fail


# -- local atomicity and refusals


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_failed_local_write_leaves_the_old_object_and_no_temporary_file(tmp_path, monkeypatch, failing):
    store = Store(str(tmp_path))
    store.write_bytes("a/x", b"old")

    monkeypatch.setattr(failing, failing_with(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(StorageError, match="disk is full") as caught:
        store.write_bytes("a/x", b"new")
    monkeypatch.undo()
    assert "\n" not in str(caught.value) and "a/x" in str(caught.value)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"] and store.read_bytes("a/x") == b"old"


def test_a_file_in_the_way_of_the_root(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for root in ("file", "file/below"):
        with pytest.raises(StorageError, match="in the way"):
            Store(str(tmp_path / root)).check_writable()


def test_an_unwritable_root(tmp_path, monkeypatch):
    # the tests may run as root, whom no mode bits stop
    monkeypatch.setattr(Path, "open", failing_with(PermissionError(errno.EACCES, os.strerror(errno.EACCES))))
    with pytest.raises(StorageError, match="Permission denied.*another root"):
        Store(str(tmp_path)).check_writable()


def test_temporary_names_are_not_objects(tmp_path):
    store = Store(str(tmp_path))
    store.write_bytes("a/.tmp-1", b"")
    assert store.list("a") == {}


# -- processes


def _read_in_child(store, answers):
    answers.put(store.read_bytes("a"))


def test_a_store_works_on_both_sides_of_a_fork(s3_root):
    store = Store(s3_root)
    store.write_bytes("a", b"1")        # connected before the fork
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_read_in_child, args=(store, answers))
    child.start()
    assert answers.get(timeout=20) == b"1"
    child.join(20)
    assert child.exitcode == 0 and store.read_bytes("a") == b"1"
