"""A server that fails: what can heal is not noticed, what cannot ends at once in one line that says what to do."""

import io
import json
import logging
import random
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import EndpointConnectionError
from faulty_s3 import KINDS, hurried, served_bucket
from tiny_run import decoded_rows, run_tiny, tiny_parameters

from hgdpo_core.errors import CorruptShardError, StorageError, TransientStorageError
from hgdpo_core.models.published import fetch_model, publish_model
from hgdpo_core.storage import MissingKeyError, Store
from hgdpo_core.storage.shards import ShardFolder

MIB = 2**20
OPERATIONS = {
    "write": lambda store: store.write_bytes("a", b"x"), "read": lambda store: store.read_bytes("a"),
    "size": lambda store: store.size("a"), "list": lambda store: store.list("a"),
    "walk": lambda store: list(store.walk()), "uploads": lambda store: list(store.unfinished_uploads())}


@pytest.fixture(scope="module")
def running():
    with served_bucket() as server:
        yield server


@pytest.fixture
def server(running, monkeypatch):
    running.behave()
    with hurried(monkeypatch):
        yield running
    running.behave()


@pytest.fixture
def store(server, tmp_path):
    return Store(f"s3://bucket/{tmp_path.name}")


def failing_with(error):
    def fail(*_, **__):
        raise error

    return fail


# -- the whole method


@pytest.fixture(scope="module")
def parameters(tmp_path_factory, target_folder, judge_folder):
    return tiny_parameters(tmp_path_factory.mktemp("user"), target_folder, judge_folder)


@pytest.fixture(scope="module")
def undisturbed(parameters, tmp_path_factory):
    root = str(tmp_path_factory.mktemp("undisturbed"))
    run_tiny(root, parameters)
    return decoded_rows(root)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_a_fifth_of_all_requests_failing_changes_no_row(store, server, seed, parameters, undisturbed):
    """On a server that knows neither conditional writes nor checksum headers."""
    server.strict = True
    server.misbehave(0.2, seed=seed, most={"delay": 5})
    run_tiny(store.root, parameters)
    assert sum(server.spoiled.values()) > 50 and server.spoiled.keys() > {"delay", "close", "lose answer"}
    server.misbehave(0.0)
    assert decoded_rows(store.root) == undisturbed


# -- what can heal


@pytest.mark.parametrize("kind", KINDS)
def test_two_failures_in_a_row_are_not_noticed(store, server, kind):
    """Of each request once."""
    def spoil(only):
        server.misbehave(1.0, kinds=(kind,), only=only, most={kind: 2 if kind != "delay" else 1})

    data = random.Random(0).randbytes(20_000)
    spoil("^PUT")
    store.write_bytes("a/x", data)
    store.write_json("a/y", {"b": [1, 2]})
    spoil("^GET.*/x")
    assert store.read_bytes("a/x") == data
    spoil("^GET.*/y")
    found = store.read_many(["a/y", "a/gone"])
    assert found.keys() == {"a/y"} and json.loads(found["a/y"]) == store.read_json("a/y") == {"b": [1, 2]}
    spoil("list-type")
    assert store.list("a").keys() == {"x", "y"}
    spoil("^HEAD")
    assert store.size("a/x") == 20_000
    spoil("^DELETE")
    store.delete("a/x")
    assert not store.exists("a/x")
    assert server.spoiled[kind] == 0 or kind not in ("cut", "shorten", "flip answer", "flip request")


def test_an_object_that_was_replaced_by_a_longer_one_is_read(store, monkeypatch):
    store.write_bytes("a", b"long")
    sizes = iter([2, 4])
    monkeypatch.setattr(store._objects, "size", lambda _: next(sizes))
    assert store.read_bytes("a") == b"long"


def test_an_etag_that_is_no_md5_is_believed_after_two_equal_reads(store, server, monkeypatch):
    get = store._objects._get
    monkeypatch.setattr(store._objects, "_get", lambda key: (get(key)[0], "0" * 32))
    store.write_bytes("a", b"1")
    assert store.read_bytes("a") == b"1"


def test_a_flipped_bit_is_no_reason_to_quarantine_a_shard(store, server):
    folder = ShardFolder.create(store, "pools/p-1", {"seed": 0})
    table = pa.table({"seed": list(range(50_000)), "text": ["x"] * 50_000})
    folder.commit(0, table)
    for read in (folder.read, lambda index: folder.read_columns(index, table.column_names)):
        server.misbehave(1.0, kinds=("flip answer",), only=r"^GET.*\.parquet", most={"flip answer": 3})
        assert read(0).equals(table) and server.spoiled["flip answer"] == 3
    server.misbehave(1.0, kinds=("flip answer",), only=r"^GET.*\.parquet")
    with pytest.raises(StorageError, match="gave up after 8 tries"):
        folder.read(0)
    assert folder.find(0) is not None


def test_pages_that_are_wrong_are_noticed_where_only_some_columns_travel(store, monkeypatch):
    monkeypatch.setattr("hgdpo_core.storage.shards._SMALL_BYTES", 0)
    folder = ShardFolder.create(store, "pools/p-1", {"seed": 0})
    manifest = folder.commit(0, pa.table({"seed": list(range(5_000)), "text": [str(i) for i in range(5_000)]}))
    key = f"pools/p-1/{manifest.file}"
    data = bytearray(store.read_bytes(key))
    data[pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0).data_page_offset + 100] ^= 1
    store.write_bytes(key, bytes(data))
    assert folder.read_columns(0, ["text"]).num_rows == 5_000
    with pytest.raises(StorageError, match="not a readable Parquet file"):
        folder.read_columns(0, ["seed"])


def test_bytes_that_are_wrong_in_the_store_are_quarantined(store, server):
    folder = ShardFolder.create(store, "pools/p-1", {"seed": 0})
    manifest = folder.commit(0, pa.table({"seed": [1, 2]}))
    store.write_bytes(f"pools/p-1/{manifest.file}", b"x" * manifest.bytes)
    with pytest.raises(CorruptShardError):
        folder.read(0)


def test_a_model_is_downloaded_until_it_is_the_one_that_was_published(store, server, tmp_path, monkeypatch):
    """Beyond one chunk nothing but the fingerprint covers its bytes."""
    monkeypatch.setattr("hgdpo_core.storage.store.CHUNK_BYTES", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights.safetensors").write_bytes(data := random.Random(0).randbytes(3000))
    server.misbehave(1.0, kinds=("flip answer",), only="^GET.*weights", most={"flip answer": 1})
    path = publish_model(store, "m-1", tmp_path / "model", {"kind": "lora"})
    assert (path / "weights.safetensors").read_bytes() == data and server.spoiled["flip answer"] == 1
    store.write_bytes("models/m-1/weights.safetensors", data[:-1] + b"?")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with pytest.raises(StorageError, match="not those its model.json was written for"):
        fetch_model(store, "m-1")


def test_a_slow_upload_is_no_silent_server(store, server, monkeypatch):
    """Patience is counted from the end of what we send: else a large part could never go over a thin line."""
    monkeypatch.setattr("hgdpo_core.storage.roots.READ_TIMEOUT_SECONDS", 1.5)
    server.slow_upload = 0.2
    store.write_bytes("a", bytes(12 * MIB))
    assert store.size("a") == 12 * MIB


# -- large objects in parts


@pytest.fixture
def parts(server, monkeypatch):
    with monkeypatch.context() as inner:
        inner.setattr("hgdpo_core.storage.store.PART_BYTES", 5 * MIB)     # the least that S3 takes
        # On a busy machine an answer comes late: the start of an upload would be sent again, the first one left.
        inner.setattr("hgdpo_core.storage.roots.READ_TIMEOUT_SECONDS", 30)
        yield


@pytest.mark.parametrize("way", ["bytes", "file"])
@pytest.mark.parametrize(("kind", "only"), [
    (None, ""), ("500", "partNumber=2"), ("close", "partNumber=1"), ("flip request", "partNumber=3"),
    ("lose answer", r"^POST.*uploadId"), ("503", r"^POST.*uploads")])
def test_a_failing_part_is_sent_again(parts, store, server, tmp_path, way, kind, only):
    server.misbehave(1.0 if kind else 0.0, kinds=(kind,), only=only, most={kind: 1})
    data = random.Random(0).randbytes(12 * MIB)
    if way == "bytes":
        store.write_bytes("models/large", data)
    else:
        (tmp_path / "model").mkdir()
        (tmp_path / "model/large").write_bytes(data)
        store.put_folder(tmp_path / "model", "models")
    uploads = [request for request in server.requests if "partNumber=" in request]
    assert sum(server.spoiled.values()) == bool(kind)
    assert len(uploads) == (4 if kind and "part" in only else 3)
    assert store.read_bytes("models/large") == data and list(store.unfinished_uploads()) == []


def test_an_upload_that_is_gone_starts_over(parts, store, server, monkeypatch):
    """Some servers forget a finished upload: then the answer that got lost cannot be asked for again."""
    finish, calls = store._objects.finish_upload, []

    def forget(key, upload_id, parts):
        calls.append(upload_id)
        if len(calls) == 1:
            raise FileNotFoundError("The specified upload does not exist.")     # as s3fs puts it
        finish(key, upload_id, parts)

    monkeypatch.setattr(store._objects, "finish_upload", forget)
    store.write_bytes("models/large", data := random.Random(0).randbytes(6 * MIB))
    assert store.read_bytes("models/large") == data and len(set(calls)) == 2
    monkeypatch.setattr(store._objects, "finish_upload", failing_with(FileNotFoundError("no such upload")))
    with pytest.raises(StorageError, match="3 uploads were gone before they were finished"):
        store.write_bytes("models/large", bytes(6 * MIB))


def test_parts_that_never_arrive_leave_no_upload_behind(parts, store, server, monkeypatch):
    monkeypatch.setattr("hgdpo_core.storage.failures.ATTEMPTS", 2)
    server.misbehave(1.0, kinds=("500",), only="partNumber=2")
    with pytest.raises(StorageError, match="gave up after 2 tries"):
        store.write_bytes("models/large", bytes(12 * MIB))
    assert list(store.unfinished_uploads()) == [] and not store.exists("models/large")


# -- what cannot heal


@pytest.mark.parametrize(("status", "code", "advice"), [
    (403, "AccessDenied", "right to it"), (403, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
    (403, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"), (403, "ExpiredToken", "new AWS credentials"),
    (403, "RequestTimeTooSkewed", "clock"), (400, "AuthorizationHeaderMalformed", "AWS_DEFAULT_REGION"),
    (400, "InvalidBucketName", "correct the bucket's name")])
def test_refusals_end_at_once_with_advice(store, server, status, code, advice):
    server.refuse_all = (status, code)
    for name, operation in OPERATIONS.items():
        server.requests.clear()
        with pytest.raises(StorageError) as caught:
            operation(store)
        message = str(caught.value)
        assert not isinstance(caught.value, MissingKeyError) and "\n" not in message
        assert len(server.requests) <= 2, name
        if name not in ("size", "read"):    # these start with a HEAD, whose answer cannot say more than 403
            assert advice in message and len(server.requests) == 1, name


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_bucket_that_is_not_there(server, name):
    with pytest.raises(StorageError, match="create the bucket or correct the root") as caught:
        OPERATIONS[name](Store("s3://no-such-bucket/x"))
    assert not isinstance(caught.value, MissingKeyError) and len(server.requests) <= 2


def test_an_endpoint_without_a_server(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited for what cannot heal"))
    with pytest.raises(StorageError, match=r"no server answers there: correct AWS_ENDPOINT_URL \(now http://127.0.0.1:9"):
        Store("s3://bucket/x").check_writable()


def test_a_server_that_was_there_is_waited_for(store, server, monkeypatch):
    store.write_bytes("a", b"")
    gone = EndpointConnectionError(endpoint_url="http://127.0.0.1:9")
    monkeypatch.setattr(store._objects.filesystem, "info", failing_with(gone))
    with pytest.raises(StorageError, match="gave up after 8 tries"):
        store.size("a")


class Website(SimpleHTTPRequestHandler):
    """Something else than S3: no such page, no such method, or "come by https"."""

    def do_GET(self):
        self.server.seen += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", "20")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"<html>hello</html>  ")

    do_PUT = do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("status", [404, 405, 301])
def test_an_endpoint_that_is_no_s3(server, monkeypatch, status):
    website = ThreadingHTTPServer(("127.0.0.1", 0), Website)
    website.status, website.seen = status, 0
    threading.Thread(target=website.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{website.server_port}")
        for operation in (OPERATIONS["write"], OPERATIONS["list"]):
            with pytest.raises(StorageError, match="does not answer as S3 does: correct AWS_ENDPOINT_URL"):
                operation(Store("s3://bucket/x"))
        assert website.seen <= 4
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{website.server_port}")
        with pytest.raises(StorageError, match="correct http or https in AWS_ENDPOINT_URL"):
            Store("s3://bucket/x").check_writable()
    finally:
        website.shutdown()


def test_no_credentials_at_all(server, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") as caught:
        Store("s3://bucket/x").check_writable()
    assert server.requests == [] and not isinstance(caught.value, TransientStorageError)


@pytest.mark.parametrize("kind", ["503", "delay"])
def test_a_server_that_stays_ill_or_silent_is_given_up(store, server, kind, monkeypatch):
    monkeypatch.setattr("hgdpo_core.storage.roots.READ_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr("hgdpo_core.storage.failures.ATTEMPTS", 3)
    server.delay = 0.5
    server.misbehave(1.0, kinds=(kind,))
    with pytest.raises(TransientStorageError, match="gave up after 3 tries; running again later can help"):
        store.read_json("a")
    assert len(server.requests) <= 3 * 4


# -- what it asks for, and what it tells


def test_requests_are_path_style_and_carry_nothing_that_old_servers_refuse(store, server):
    server.strict = True
    for operation in ("write", "read", "size", "list", "walk", "uploads"):
        OPERATIONS[operation](store)
    store.move("a", "b")
    store.delete("b")
    assert all(request.split()[1].startswith("/bucket") for request in server.requests)
    assert {headers["host"] for headers in server.headers} == {server.url.removeprefix("http://")}


def test_our_logs_and_errors_hold_no_credentials(server, monkeypatch, caplog):
    secrets = {"AWS_ACCESS_KEY_ID": "AKIAVERYVISIBLE", "AWS_SECRET_ACCESS_KEY": "hunter2hunter2",
               "AWS_SESSION_TOKEN": "token-hunter2"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    store = Store("s3://bucket/quiet")
    caplog.set_level(logging.DEBUG, logger="hgdpo_core")
    server.misbehave(0.5, kinds=("500", "close", "cut", "flip request"))
    for index in range(8):
        store.write_bytes(f"a/{index}", b"data")
        store.read_bytes(f"a/{index}")
    server.refuse_all = (403, "InvalidAccessKeyId")
    with pytest.raises(StorageError) as caught:
        store.write_bytes("a", b"")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("hgdpo_core")]
    assert any("try 2 of 8" in line and "quiet/a/" in line for line in ours)
    for text in (*ours, str(caught.value), repr(store), repr(store.__reduce__())):
        assert not any(secret in text for secret in secrets.values()), text
