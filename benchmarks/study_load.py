"""Many people answer a study at once: how long an answer takes to be acknowledged, what is stored, memory.

    python -m benchmarks.study_load                                   # 200 people, 100 answers each, one per second
    python -m benchmarks.study_load --people 20 --answers 10          # half a minute
    python -m benchmarks.study_load --store s3                        # the root is a bucket of moto's server

The server is `hgdpo study serve` in a process of its own; each simulated participant joins, then answers once per
`--every` seconds, and loads both images of each question with `--images`. In the end each acknowledged answer has to be
in the store, once.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import pyarrow as pa

from hgdpo_core.config.study import StudyConfig
from hgdpo_core.images import encode_image
from hgdpo_core.prompts import prompt_id
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import write_table
from hgdpo_core.study.study import CONFIG_NAME, PAIRS_NAME, Study, open_study
from hgdpo_core.study.votes import PAIRS, STUDIES, read_votes

START_SECONDS = 120.0


@dataclass
class Load:
    """What was measured."""

    seconds: list[float] = field(default_factory=list)
    """Of each answer, from the request to its acknowledgement."""
    acknowledged: dict[str, str] = field(default_factory=dict)
    """Trial -> choice."""
    refused: list[int] = field(default_factory=list)
    """Statuses of answers that were not acknowledged at once."""
    memory: list[int] = field(default_factory=list)
    """Bytes of the server, each second."""


def make_study(root: str, people: int, answers: int, size: int) -> Study:
    """A study of random images, written as `hgdpo study create` writes one."""
    store, random_pixels = Store(root), np.random.default_rng(0)
    rows = []
    for number in range(answers):
        prompt = f"a person, number {number}"
        images = [encode_image(random_pixels.integers(0, 64, (size, size, 3), dtype=np.uint8), "webp")
                  for _ in range(2)]
        rows.append({"pair": secrets.token_hex(16), "prompt_id": prompt_id(prompt), "prompt": prompt,
                     "first": "target", "second": "tuned", "first_image": images[0], "second_image": images[1],
                     "first_scores": [], "second_scores": []})
    config = StudyConfig.model_validate({"sources": ("evaluations/load",), "pairs": answers, "people": people,
                                         "questions": answers, "repeats": 0, "checks": 0})
    write_table(store, f"{STUDIES}/load/{PAIRS_NAME}", pa.Table.from_pylist(rows, schema=PAIRS))
    store.write_json(f"{STUDIES}/load/{CONFIG_NAME}", {"config": config.model_dump(mode="json"), "refused": {}})
    return open_study(store, "load")


@contextlib.contextmanager
def running(command: list[str], port: int, how: int = signal.SIGTERM) -> Iterator[subprocess.Popen[bytes]]:
    """A process that listens on a port, ended at the end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=None if "flows.cli" in command else
                               subprocess.DEVNULL)  # moto writes a line for each request
    try:
        until = time.monotonic() + START_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{' '.join(command[:5])} did not start")
            time.sleep(0.1)
        yield process
    finally:
        process.send_signal(how)
        process.wait(60)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def free_port() -> int:
    """A TCP port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def root_of(kind: str, folder: Path) -> Iterator[str]:
    """A root: a folder, or a bucket of moto's server in a process of its own."""
    if kind == "folder":
        yield str(folder / "root")
        return
    port = free_port()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test",
                   "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        asyncio.run(_make_bucket(port))
        yield "s3://bucket/load"


async def _make_bucket(port: int) -> None:
    async with aiohttp.ClientSession() as session, session.put(f"http://127.0.0.1:{port}/bucket") as response:
        response.raise_for_status()


# -- participants


async def take_part(url: str, load: Load, options: argparse.Namespace, number: int) -> None:
    """One participant, from joining to the last answer."""
    headers = {"Origin": url}
    draw = random.Random(number)
    # a cookie of an address counts only where it is asked for
    async with aiohttp.ClientSession(url, headers=headers, cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        await asyncio.sleep(draw.random() * options.every)
        async with session.post("/api/join", json={"consent": True}) as response:
            response.raise_for_status()
            state = await response.json()
        start = time.perf_counter()
        for count in range(options.answers):
            await asyncio.sleep(max(0.0, start + count * options.every - time.perf_counter()))
            trial = state["current"]
            if options.images:
                await asyncio.gather(*(_load_image(session, trial["trial"], side) for side in ("left", "right")))
            state = await _answer(session, load, trial["trial"], draw.choice(["left", "right", "tie"]))


async def _load_image(session: aiohttp.ClientSession, trial: str, side: str) -> None:
    async with session.get(f"/images/{trial}/{side}") as response:
        response.raise_for_status()
        await response.read()


async def _answer(session: aiohttp.ClientSession, load: Load, trial: str, choice: str) -> dict[str, Any]:
    while True:
        begun = time.perf_counter()
        body = {"trial": trial, "choice": choice, "revision": 0, "ms": 900}
        async with session.post("/api/answer", json=body) as response:
            if response.status == 200:
                state = await response.json()
                load.seconds.append(time.perf_counter() - begun)
                load.acknowledged[trial] = choice
                return state
            load.refused.append(response.status)
        await asyncio.sleep(0.5)


async def measure(url: str, process: int, options: argparse.Namespace) -> Load:
    """All participants together, and the server's memory meanwhile."""
    load, server = Load(), psutil.Process(process)

    async def watch() -> None:
        while True:
            load.memory.append(server.memory_info().rss)
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(take_part(url, load, options, number) for number in range(options.people)))
    watching.cancel()
    return load


def report(load: Load, study: Study, took: float) -> dict[str, Any]:
    """The numbers, once all is in the store."""
    rows = read_votes(study.store, study.id).to_pylist()
    stored = {row["trial"]: row["choice"] for row in rows}
    ms = np.array(load.seconds) * 1000
    half = len(load.memory) // 2
    return {"acknowledged": len(load.acknowledged), "stored": len(rows),
            "lost": len(load.acknowledged.items() - stored.items()), "doubled": len(rows) - len(stored),
            "refused at first": len(load.refused), "answers per second": round(len(ms) / took, 1),
            **{f"p{part} ms": round(float(np.percentile(ms, part)), 1) for part in (50, 95, 99)},
            "longest ms": round(float(ms.max()), 1),
            "memory MiB": [round(size / 2**20, 1) for size in (load.memory[0], load.memory[half], load.memory[-1])]}


def main() -> int:
    """The command; returns 1 where an answer was lost or doubled."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--answers", type=int, default=100)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two answers of a person")
    parser.add_argument("--store", choices=("folder", "s3"), default="folder")
    parser.add_argument("--images", action="store_true", help="load the images of each question too")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hgdpo-") as folder, root_of(options.store, Path(folder)) as root:
        study, port = make_study(root, options.people, options.answers, options.size), free_port()
        command = [sys.executable, "-m", "flows.cli", "study", "serve", study.id, "--root", study.store.root, "--port",
                   str(port), "--log", f"{folder}/log"]
        with running(command, port, signal.SIGINT) as process:
            begun = time.perf_counter()
            load = asyncio.run(measure(f"http://127.0.0.1:{port}", process.pid, options))
            took = time.perf_counter() - begun
        result = report(load, study, took)
    print(json.dumps({"people": options.people, "answers each": options.answers, "store": options.store,
                      "images": options.images, **result}, indent=1))
    return int(result["lost"] > 0 or result["doubled"] > 0)


if __name__ == "__main__":
    sys.exit(main())
