"""Many pairs in flat memory, resumed by the shard; from a bucket; and what a killed process leaves."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_s3 import served_bucket
from pair_files import PICK_A_PIC, pair, pair_stage, write_parquet

from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.errors import StoppedError
from hgdpo_core.stages.base import Worker
from hgdpo_core.storage import Store

ROOT = Path(__file__).parents[3]
PAIRS, FILES = 100_000, 4
GROWTH_KIB = 24 * 1024  # 4 MiB here, over 44 shards


def write_many(folder: Path) -> Path:
    """10^5 rows without images, in a few files, two of one row group and two of many."""
    folder.mkdir()
    for number in range(FILES):
        columns = {field.name: pa.nulls(PAIRS // FILES, field.type) for field in PICK_A_PIC}
        start = number * PAIRS // FILES
        captions = [f"a man in a long street, number {start + row}, at dusk" for row in range(PAIRS // FILES)]
        columns |= {"caption": pa.array(captions), "label_0": pa.array([1.0, 0.0] * (PAIRS // FILES // 2)),
                    "has_label": pa.array([True] * (PAIRS // FILES)),
                    "are_different": pa.array([True] * (PAIRS // FILES))}
        pq.write_table(pa.table(columns, schema=PICK_A_PIC), folder / f"train-{number:05d}.parquet",
                       row_group_size=PAIRS if number % 2 else 3_000)
    return folder


def test_a_hundred_thousand_pairs_in_flat_memory_resumed_after_a_stop(tmp_path):
    source = PairSource(source=str(write_many(tmp_path / "many")), rows_per_shard=2048)
    stage = pair_stage(Store(str(tmp_path / "root")), source, (16, 16))
    assert len(stage.indices) == 49
    made = []
    with pytest.raises(StoppedError):
        stage.make(Worker("cpu", on_shard=made.append, should_stop=lambda: len(made) >= 5))
    before = len(stage.existing())
    assert 5 <= before <= 8
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert stage.make(Worker("cpu")) == PAIRS - before * 2048
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert growth < GROWTH_KIB, f"{growth} KiB"
    counts = stage.counts()
    assert counts.read == PAIRS and counts.reasons == {"an image is missing": PAIRS}
    assert sum(stage.folder.rejected().values()) == PAIRS


def test_a_killed_process_leaves_whole_shards_and_the_rest_is_made_as_without_it(tmp_path):
    rows = [pair(number, number % 2) for number in range(60)]
    source = write_parquet(tmp_path / "pairs", rows, files=2, row_group_size=7)
    program = textwrap.dedent("""
        import os, signal, sys
        from hgdpo_core.config.pair_source import PairSource
        from hgdpo_core.pair_sets import open_pair_set
        from hgdpo_core.stages.base import Worker
        from hgdpo_core.stages.pair_sets import PairSetStage
        from hgdpo_core.storage import Store
        made = []
        def kill(manifest):
            made.append(manifest)
            if len(made) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        stage = PairSetStage.of(Store(sys.argv[1]), open_pair_set(PairSource(source=sys.argv[2], rows_per_shard=5)),
                                (16, 16))
        stage.make(Worker("cpu", on_shard=kill))
    """)
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "root"), str(source)], cwd=ROOT,
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    settings = PairSource(source=str(source), rows_per_shard=5)
    stage = pair_stage(Store(str(tmp_path / "root")), settings, (16, 16))
    kept = stage.existing()
    assert len(kept) == 4 and stage.make(Worker("cpu")) == 60 - 4 * 5
    whole = pair_stage(Store(str(tmp_path / "other")), settings, (16, 16))
    whole.make(Worker("cpu"))
    assert stage.folder.key == whole.folder.key
    for index in whole.indices:
        assert stage.folder.read(index).equals(whole.folder.read(index))
    assert {index: stage.folder.find(index) for index in kept} == kept  # not made again


def test_pairs_in_a_bucket_become_triplets_in_a_bucket(tmp_path):
    with served_bucket() as server:
        write_parquet(tmp_path / "pairs", [pair(number, number % 2) for number in range(12)], files=2)
        Store("s3://bucket/data").put_folder(tmp_path / "pairs", "pairs")
        source = PairSource(source="s3://bucket/data/pairs", rows_per_shard=5)
        server.misbehave(0.02, seed=1, kinds=("500", "close", "cut"))
        stage = pair_stage(Store("s3://bucket/root"), source, (16, 16))
        assert stage.make(Worker("cpu")) == 12 and stage.counts().triplets == 12
        captions = [caption for index in stage.indices for caption in stage.folder.read(index)["caption"].to_pylist()]
        assert captions == [f"a woman, number {number}" for number in range(12)]
        server.behave()
        again = pair_stage(Store("s3://bucket/root"), source, (16, 16))
        assert again.folder.key == stage.folder.key and again.find_missing() == []
        pattern = PairSource(source="s3://bucket/data/pairs/data/train-00001*")
        assert len(pair_stage(Store("s3://bucket/root"), pattern, (16, 16)).pairs) == 6
