"""The hub's own client and file system against a small server that answers as the hub does."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from pair_files import pair, pair_stage, write_parquet

from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.stages.base import Worker
from hgdpo_core.storage import Store

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One data set, `owner/pairs`, in `folder`."""

    folder: Path
    requests: list[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(unquote(self.path))
        self.requests.append(f"{self.command} {url.path}")
        if url.path.startswith(f"/api/datasets/owner/pairs/tree/{SHA}"):
            return self._send(json.dumps(self._tree(url.path.partition(SHA)[2].strip("/"), url.query)).encode())
        if url.path.startswith("/api/datasets/owner/pairs"):
            info = {"id": "owner/pairs", "sha": SHA, "gated": False, "private": False, "tags": [], "downloads": 0,
                    "likes": 0, "siblings": [], "cardData": {"license": "apache-2.0"}}
            return self._send(json.dumps(info).encode())
        path = self.folder / url.path.removeprefix(f"/datasets/owner/pairs/resolve/{SHA}/")
        if not path.is_file():
            return self._send(b"{}", 404)
        data, status = path.read_bytes(), 200
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data, status = data[int(first):int(last) + 1], 206
        return self._send(data, status)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.requests.append(f"POST {self.path}")
        self._send(b"[]")

    def _tree(self, below: str, query: str) -> list[dict]:
        base = self.folder / below
        found = base.rglob("*") if "recursive=true" in query.lower() else base.glob("*")
        return [{"type": "directory" if path.is_dir() else "file", "oid": "0" * 40,
                 "size": 0 if path.is_dir() else path.stat().st_size,
                 "path": path.relative_to(self.folder).as_posix()} for path in sorted(found)]

    def _send(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    write_parquet(tmp_path / "hub", [pair(number, number % 2) for number in range(20)], files=2)
    (tmp_path / "hub" / "README.md").write_text("card")
    handler = type("Handler", (Hub,), {"folder": tmp_path / "hub", "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield handler
    server.shutdown()
    server.server_close()


def test_pairs_stream_from_the_hub_by_ranges_at_one_commit(hub, tmp_path):
    stage = pair_stage(Store(str(tmp_path / "root")), PairSource(source="owner/pairs", rows_per_shard=8), (16, 16))
    assert (stage.pairs.revision, stage.pairs.licence, len(stage.pairs)) == (SHA, "apache-2.0", 20)
    assert stage.make(Worker("cpu")) == 20 and stage.counts().triplets == 20
    captions = [caption for index in stage.indices for caption in stage.folder.read(index)["caption"].to_pylist()]
    assert captions == [f"a woman, number {number}" for number in range(20)]
    assert stage.folder.read(0)["model_fingerprint"][0].as_py() == f"foreign:owner/pairs@{SHA}"
    asked = [request for request in hub.requests if "/api/" in request]
    assert len(asked) < 20, asked  # the hub limits questions to its API: none for each range
