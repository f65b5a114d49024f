"""Evaluations and triplets made by hand, studies of them, and a participant who asks the server as the page does."""

import asyncio
import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from hgdpo_core.config.study import StudyConfig
from hgdpo_core.prompts import prompt_id
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.study.create import create_study
from hgdpo_core.study.server import StudyServer, create_app
from hgdpo_core.study.session import Participant, StudySession
from hgdpo_core.study.study import Study, StudyImages, log_folder
from hgdpo_core.study.votes import Choice

POOL = pa.schema([
    ("prompt_id", pa.string()), ("prompt", pa.string()), ("index", pa.int32()), ("seed", pa.int64()),
    ("image", pa.binary()), ("width", pa.int32()), ("height", pa.int32())])
SCORES = pa.schema([("prompt_id", pa.string()), ("index", pa.int32()), ("score", pa.float32())])
PROMPTS = [f"a woman in a red top, number {i}" for i in range(12)]
ROOT = Path(__file__).parents[1]


def encoded(colour: int, *, size: tuple[int, int] = (16, 24), kind: str = "PNG", exif: bytes = b"") -> bytes:
    """An image of (height, width) with a gradient, so that its noise differs from it."""
    pixels = np.full((*size, 3), colour % 256, dtype=np.uint8)
    pixels[..., 1] = np.linspace(0, 255, size[1]).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"exif": exif} if exif else {}))
    return buffer.getvalue()


def make_pool(store: Store, name: str, images: dict[str, bytes], *, seed: int = 7, score: float = 0.5) -> str:
    """A pool with one image of each prompt, and its scores; returns its key."""
    rows = [{"prompt_id": prompt_id(prompt), "prompt": prompt, "index": 0, "seed": seed, "image": image, "width": 24,
             "height": 16} for prompt, image in images.items()]
    pool = ShardFolder.create(store, f"pools/{name}", {"stage": "pool", "name": name})
    scores = ShardFolder.create(store, f"scores/{name}/pickscore-1", {"stage": "score", "scorer": "pickscore"})
    for index, start in enumerate(range(0, len(rows), 5)):
        part = rows[start:start + 5]
        pool.commit(index, pa.Table.from_pylist(part, schema=POOL),
                    details={"prompt_ids": [row["prompt_id"] for row in part]})
        scored = [{"prompt_id": row["prompt_id"], "index": 0, "score": score} for row in part]
        scores.commit(index, pa.Table.from_pylist(scored, schema=SCORES))
    return f"pools/{name}"


def make_evaluation(store: Store, name: str = "12-a", *, target: str = "", tuned: str = "",
                    prompts: list[str] = PROMPTS) -> str:
    """An evaluation of two pools, by default of two new ones; returns its key."""
    images = [{prompt: encoded(20 * number + shade) for number, prompt in enumerate(prompts)} for shade in (0, 9)]
    target = target or make_pool(store, f"target-{name}", images[0], score=0.25)
    tuned = tuned or make_pool(store, f"tuned-{name}", images[1], score=0.75)
    keys = [f"scores/{pool.split('/')[-1]}/pickscore-1" for pool in (target, tuned)]
    store.write_json(f"evaluations/{name}/config.json", {
        "target": target, "tuned": tuned, "prompts": prompts, "scores": {"pickscore": keys}})
    return f"evaluations/{name}"


def make_study(root: str, **settings: Any) -> Study:
    """A study of 12 pairs, for one person unless the settings say otherwise: 12 questions, a repeat and a check."""
    store = Store(root)
    if not store.exists("evaluations/12-a/config.json"):
        make_evaluation(store)
    config = StudyConfig.model_validate({"sources": ("12-a",), "pairs": 12, "people": 5, **settings})
    return create_study(store, config).study


@contextlib.contextmanager
def served(study: Study, folder: Path, **settings: Any) -> Iterator[TestClient]:
    """The server's application, without a process: `.app.state.server` is the StudyServer."""
    session = StudySession(study, log_folder(study))
    folder.mkdir(parents=True, exist_ok=True)
    server = StudyServer(session, StudyImages.unpack(study, folder), **settings)
    app = create_app(server, move_seconds=3600)
    app.state.server = server
    with TestClient(app, base_url="http://127.0.0.1:8321") as client:
        client.headers["Origin"] = "http://127.0.0.1:8321"
        yield client


def join(client: TestClient, **body: Any) -> dict[str, Any]:
    """Take part; the state."""
    response = client.post("/api/join", json={"consent": True, **body})
    assert response.status_code == 200, response.text
    return response.json()


def answer(client: TestClient, trial: dict[str, Any], choice: str = "left", **changes: Any) -> Any:
    """Answer a trial of the state; the response."""
    body = {"trial": trial["trial"], "choice": choice, "revision": trial["revision"], "ms": 900, **changes}
    return client.post("/api/answer", json=body)


# -- a session, without a server


def answers(session: StudySession, participant: Participant, count: int, choice: Choice = "left") -> None:
    """Give the next answers, all the same."""
    async def give() -> None:
        for _ in range(count):
            trial = session.trial_id(participant, participant.done)
            assert await session.answer(participant, trial, choice, 0, 1000)

    asyncio.run(give())


def one_answer(session: StudySession, participant: Participant, position: int, choice: Choice, revision: int) -> bool:
    """Answer one trial; whether it was stored."""
    trial = session.trial_id(participant, position)
    return asyncio.run(session.answer(participant, trial, choice, revision, 500))


def joined(session: StudySession) -> tuple[Participant, str]:
    """A new participant and the code."""
    return asyncio.run(session.join())


# -- served on a port


@contextlib.contextmanager
def listening(study: Study, folder: Path) -> Iterator[tuple[str, StudySession]]:
    """The server in a thread of this process: its address, and the session."""
    folder.mkdir(parents=True, exist_ok=True)
    session = StudySession(study, log_folder(study))
    app = create_app(StudyServer(session, StudyImages.unpack(study, folder)), move_seconds=3600)
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.config.port}/", session
    server.should_exit = True
    thread.join(20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess:
    """`hgdpo study serve` in a process of its own, which can be killed and started again on the same port."""

    def __init__(self, study: Study, port: int | None = None):
        self.study, self.port = study, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start and wait until the page is there."""
        command = [sys.executable, "-m", "flows.cli", "study", "serve", self.study.id, "--root", self.study.store.root,
                   "--port", str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                        env={**os.environ, "PYTHONPATH": str(ROOT)})
        for _ in range(600):
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self.url}/api/state", timeout=5).read()
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"the server did not start: {self.end(signal.SIGKILL)}")

    def end(self, how: int = signal.SIGTERM) -> str:
        """End the process; what it wrote to stderr."""
        self.process.send_signal(how)
        return self.process.communicate(timeout=30)[1].decode()


def copy_kept_store(folder: Path) -> Store:
    """The kept store of tests/golden, where a study can be written."""
    shutil.copytree(ROOT / "tests" / "golden" / "store", folder)
    return Store(str(folder))
