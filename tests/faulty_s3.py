"""An S3 server on loopback that misbehaves on demand: moto's server behind a small HTTP proxy."""

import hashlib
import http.client
import logging
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hgdpo_core.storage import Store

ERRORS = {"500": ("InternalError", "Internal Server Error"), "503": ("SlowDown", "Slow Down"),
          "429": ("TooManyRequests", "Too Many Requests")}
KINDS = (*ERRORS, "close", "lose answer", "delay", "cut", "shorten", "flip answer", "flip request")
SECRET = "a-secret-of-the-tests"
REFUSED = ("x-amz-checksum", "x-amz-sdk-checksum", "x-amz-trailer", "content-md5")


class FaultyS3:
    """`fraction` of all requests fail in one of `kinds`, drawn from a seeded generator.

    close: no answer and nothing done; lose answer: done, no answer; delay: an answer after `delay` seconds; cut: half
    of the body its header promises; shorten: half of the body, and a header that says so; flip: one bit of an object's
    bytes, on the way back or on the way there. LIST answers are cut but never flipped: nothing in S3 covers them.

    Like real servers, and unlike moto, it refuses a body that is not the one its request was signed for. `strict`
    refuses what older servers do not know: conditional writes, checksum headers and trailers. `slow_upload`: seconds
    that each MiB of a large body takes; `rewrite` changes the bodies of answers; `refuse_all`: status and code for all,
    or for those with `only_refuse` in their path.
    """

    def __init__(self) -> None:
        moto = pytest.importorskip("moto.server", reason="moto[server] is not installed: no S3 to test against")
        from moto.s3.models import s3_backends

        self.moto = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.moto.start()
        s3_backends.reset()     # moto's buckets outlive its servers, within one process
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.behave()
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"faulty": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.environment = {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "test",
                            "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}

    def behave(self) -> None:
        """No faults from here on; forget what was counted."""
        self.misbehave(0.0)
        self.delay, self.strict, self.slow_upload = 2.0, False, 0.0
        self.rewrite: Callable[[bytes], bytes] | None = None
        self.refuse_all: tuple[int, str] | None = None
        self.only_refuse = ""
        self.requests.clear()
        self.headers.clear()

    def misbehave(self, fraction: float, *, seed: int = 0, kinds: tuple[str, ...] = KINDS, only: str = "",
                  most: dict[str, int] | None = None) -> None:
        """`only`: what the request line must match; `most`: how often at most, by kind."""
        self.fraction, self.random, self.kinds = fraction, random.Random(seed), kinds
        self.only, self.most = only, most or {}
        self.spoiled = Counter[str]()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.moto.stop()

    def draw(self, request: str, possible: set[str]) -> str | None:
        """A fault for one request, None for none."""
        with self.lock:
            kinds = [kind for kind in self.kinds
                     if kind in possible and self.spoiled[kind] < self.most.get(kind, 1 << 30)]
            if not kinds or not re.search(self.only, request) or self.random.random() >= self.fraction:
                return None
            kind = self.random.choice(kinds)
            self.spoiled[kind] += 1
            return kind

    def flipped(self, data: bytes) -> bytes:
        with self.lock:
            location, bit = self.random.randrange(max(1, len(data))), self.random.randrange(8)
        return data[:location] + bytes([data[location] ^ (1 << bit)]) + data[location + 1:] if data else data


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def server_bind(self) -> None:
        # the kernel would otherwise take megabytes that nobody has read: `slow_upload` would slow nothing down
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass    # the client hung up first, as it may


class _Handler(BaseHTTPRequestHandler):
    faulty: FaultyS3
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        faulty, body = self.faulty, self._body()
        with faulty.lock:
            faulty.requests.append(request := f"{self.command} {self.path}")
            faulty.headers.append({name.lower(): value for name, value in self.headers.items()})
        fault = faulty.draw(request, self._possible(body))
        if fault == "close":
            return self._hang_up()
        if fault in ERRORS:
            return self._error(int(fault), *ERRORS[fault])
        if fault == "flip request":
            body = faulty.flipped(body)
        if refusal := self._refusal(body):
            return self._error(*refusal)
        status, headers, answer = self._forward(body)
        if fault == "lose answer":
            return self._hang_up()
        if fault == "delay":
            time.sleep(faulty.delay)
        if fault == "flip answer" and status in (200, 206):
            answer = faulty.flipped(answer)
        if faulty.rewrite:
            answer = faulty.rewrite(answer)
        return self._answer(status, headers, answer, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _body(self) -> bytes:
        left = int(self.headers.get("Content-Length") or 0)
        parts = []
        while left:
            time.sleep(self.faulty.slow_upload if left > 1 << 20 else 0)
            parts.append(self.rfile.read(min(left, 1 << 20)))
            left -= len(parts[-1]) or left
        return b"".join(parts)

    def _possible(self, body: bytes) -> set[str]:
        path, _, query = self.path.partition("?")
        possible = {*ERRORS, "close", "lose answer", "delay"}
        if self.command == "GET":
            possible |= {"cut", "shorten"}
            if path.strip("/").count("/") and "uploads" not in query:
                possible.add("flip answer")
        if self.command == "PUT" and body:
            possible.add("flip request")
        return possible

    def _refusal(self, body: bytes) -> tuple[int, str, str] | None:
        if self.faulty.refuse_all and self.faulty.only_refuse in self.path:
            return *self.faulty.refuse_all, "refused by the test"
        signed = self.headers.get("x-amz-content-sha256", "")
        if len(signed) == 64 and hashlib.sha256(body).hexdigest() != signed:
            return 400, "XAmzContentSHA256Mismatch", "The body is not the signed one."
        if self.faulty.strict:
            for name in map(str.lower, self.headers):
                conditional = self.command in ("PUT", "POST") and name in ("if-match", "if-none-match")
                if conditional or name.startswith(REFUSED) or "aws-chunked" in self.headers[name]:
                    return 501, "NotImplemented", f"A header you provided implies functionality: {name}"
        return None

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        host, port = self.faulty.moto.get_host_and_port()
        connection = http.client.HTTPConnection(host, port, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "expect")}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), data

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: str | None = None) -> None:
        promised = len(body)
        if fault in ("cut", "shorten"):
            body = body[:len(body) // 2]
            promised = promised if fault == "cut" else len(body)
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        length = dict((name.lower(), value) for name, value in headers).get("content-length", "0")
        self.send_header("Content-Length", length if self.command == "HEAD" else str(promised))
        self.end_headers()
        self.wfile.write(body)
        if fault == "cut":
            self._hang_up()

    def _error(self, status: int, code: str, message: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self._answer(status, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else text.encode())

    def _hang_up(self) -> None:
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served_bucket(name: str = "bucket") -> Iterator[FaultyS3]:
    """A running server with one empty bucket, its address and test credentials in the environment."""
    server = FaultyS3()
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in server.environment.items():
            patch.setenv(variable, value)
        for variable in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
            patch.delenv(variable, raising=False)
        Store(f"s3://{name}")._objects.filesystem.call_s3("create_bucket", Bucket=name)
        server.behave()
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def hurried(patch: pytest.MonkeyPatch, *, read_timeout: float = 2.0) -> Iterator[None]:
    """Pauses between tries a hundred times shorter, and a shorter patience with a silent server."""
    from botocore.retries.standard import ExponentialBackoff

    pause = ExponentialBackoff.delay_amount
    with patch.context() as inner:
        inner.setattr(ExponentialBackoff, "delay_amount", lambda *args: pause(*args) / 100)
        inner.setattr("hgdpo_core.storage.failures.FIRST_PAUSE_SECONDS", 0.004)
        inner.setattr("hgdpo_core.storage.roots.READ_TIMEOUT_SECONDS", read_timeout)
        yield
