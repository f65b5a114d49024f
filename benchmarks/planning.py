"""How long planning takes where there is much to plan or much to find, and how much memory.

    python -m benchmarks.planning --prompts 1000 100000 --shards 3000

First prompts without images: read, assigned to shards, cut into shard runs, in a process of its own for each
number, so that its peak of memory is its own. Then roots whose pool and scores are finished, in a local folder and on
moto's S3 server: `hgdpo plan` of it. Their data files are placeholders, for a plan opens none. CPU seconds stand beside
the wall clock's, for machines that are busy with other work.
"""

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3

from hgdpo_core.execution.jobs import cut
from hgdpo_core.plan import plan_run
from hgdpo_core.run import Run, open_run
from hgdpo_core.stages.pool import PoolPlan, plan_pool
from hgdpo_core.stages.scores import score_folder
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder, ShardManifest

PROMPTS_PER_SHARD = 16
DATA = b"placeholder"
BUCKET = "bucket"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="*", default=[1000, 100_000], help="new prompts to plan")
    parser.add_argument("--shards", type=int, default=3000, help="finished shards of a pool, and as many of scores")
    parser.add_argument("--roots", nargs="*", default=["local", "s3"], choices=["local", "s3"], help="where they lie")
    parser.add_argument("--new", type=int, help=argparse.SUPPRESS)      # what a process of its own measures
    options = parser.parse_args()
    if options.new is not None:
        return _plan_new(options.new)
    for count in options.prompts:
        subprocess.run([sys.executable, "-m", "benchmarks.planning", "--new", str(count)], check=True)
    with tempfile.TemporaryDirectory() as folder:
        if "local" in options.roots:
            _find_finished(Path(folder), f"{folder}/root", options.shards, "local folder")
        if "s3" in options.roots:
            with _s3():
                _find_finished(Path(folder), f"s3://{BUCKET}/root", options.shards, "moto's S3 server")
    return None


def _plan_new(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prompts = _write_prompts(Path(folder), count)
        started = _peak_megabytes()
        wall, cpu = time.monotonic(), time.process_time()
        run = _open(f"{folder}/root", prompts)
        pool = _plan_pool(run)
        requests = cut(pool, pool.indices, run.config.workers.draw_images_per_run)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        print(f"{count:,} new prompts: {len(pool.shards):,} shards in {len(requests):,} shard runs after {wall:.1f} s "
              f"({cpu:.1f} s of CPU); memory at most {_peak_megabytes():.0f} MiB, {started:.0f} before", flush=True)


def _find_finished(folder: Path, root: str, shards: int, where: str) -> None:
    prompts = _write_prompts(folder, shards * PROMPTS_PER_SHARD)
    run = _open(root, prompts)
    pool = _plan_pool(run)
    _finish(pool.folder, pool.indices, lambda index: {"prompt_ids": pool.shards[index].prompt_ids})
    scores = score_folder(run.store, pool.pool_id, run.config.scorer)
    _finish(scores, pool.indices, lambda index: {}, made_from=pool.folder)
    wall, cpu = time.monotonic(), time.process_time()
    plan = plan_run(_open(root, prompts, dry=True))
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    found = {stage.stage: stage.shards - stage.missing_shards for stage in plan.stages}
    assert found["pool"] == found["score"] == shards and found["triplets"] == 0, found
    print(f"{where}: {2 * shards:,} finished shards found and planned around after {wall:.1f} s ({cpu:.1f} s of CPU)",
          flush=True)


def _write_prompts(folder: Path, count: int) -> Path:
    path = folder / f"{count}.txt"
    path.write_text("".join(f"a portrait of a person, number {i}, natural light, looking at the camera\n"
                            for i in range(count)))
    return path


def _open(root: str, prompts: Path, *, dry: bool = False) -> Run:
    return open_run("figures", root, prompts=str(prompts), dry=dry, overrides={
        "images": None, "target.dtype": "float32", "pool.prompts_per_shard": PROMPTS_PER_SHARD})


def _plan_pool(run: Run) -> PoolPlan:
    return plan_pool(run.store, run.target, run.config.sampler.plain, run.config.pool, run.prompts.prompts)


def _finish(folder: ShardFolder, indices: list[int], details: Callable[[int], dict[str, Any]],
            made_from: ShardFolder | None = None) -> None:
    """Manifests as `commit` writes them, and data files that are never opened, without the checks of `commit`."""
    digest = hashlib.sha256(DATA).hexdigest()
    inputs = made_from.manifests() if made_from else {}

    def write(index: int) -> None:
        manifest = ShardManifest(
            format_version=1, index=index, file=f"shard-{index:05d}-{digest[:12]}.parquet", rows=20 * PROMPTS_PER_SHARD,
            bytes=len(DATA), sha256=digest, columns={"prompt_id": "string"}, config_hash=folder.config_hash,
            inputs=(made_from.input_shard(index, manifest=inputs[index]),) if made_from else (), libraries={},
            code_version="0", device="cpu", batch_size=8, seconds=1.0, created_at="2030-01-01T00:00:00+00:00",
            details=details(index))
        _put(folder.store, f"{folder.key}/{manifest.file}", DATA)
        _put(folder.store, f"{folder.key}/shard-{index:05d}.json", manifest.model_dump_json().encode())

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(write, indices))


def _put(store: Store, key: str, data: bytes) -> None:
    path = store.local_path(key)
    if path is not None:
        path.write_bytes(data)      # no fsync: this is a stage set
    else:
        store.write_bytes(key, data)


@contextmanager
def _s3() -> Iterator[None]:
    """Moto's server in a process of its own; the environment of this one reaches it."""
    from moto.server import ThreadedMotoServer

    free = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    free.start()
    host, port = free.get_host_and_port()
    free.stop()
    url = f"http://{host}:{port}"
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                   "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        client = boto3.client("s3")
        _until_it_answers(client)
        yield
    finally:
        server.terminate()
        server.wait()


def _until_it_answers(client: Any) -> None:
    for _ in range(600):
        try:
            client.create_bucket(Bucket=BUCKET)
            return
        except Exception:           # not yet
            time.sleep(0.2)
    raise SystemExit("moto's server does not answer")


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
