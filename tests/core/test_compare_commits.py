"""The comparing script sees one differing row, tensor, number or id, and nothing in what may differ."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from compare_commits import ADDED, compare_roots
from safetensors.numpy import save_file

ROWS = {"prompt_id": ["a", "b", "b"], "score": [1.0, float("nan"), 3.0], "image": [b"one", b"two", b"three"]}


def write_root(root: Path, rows: dict | None = None, *, weight: float = 1.0, rate: float = 0.5,
               config: dict | None = None, stamp: str = "0" * 12) -> Path:
    """A shard, a model and a summary; `stamp` and the root's name must not count."""
    scores, model, run = root / "scores/n3-a/pickscore-b", root / "models/dpo-c", root / "runs/figures-d"
    for folder in (scores, model, run):
        folder.mkdir(parents=True)
    pq.write_table(pa.table(rows or ROWS), scores / f"shard-00000-{stamp}.parquet")
    manifest = {"file": f"shard-00000-{stamp}.parquet", "sha256": stamp, "bytes": int(stamp, 16), "seconds": weight,
                "rows": 3, "config_hash": "b", "created_at": stamp,
                "inputs": [{"key": f"pools/n3-a/shard-00000-{stamp}.parquet", "sha256": stamp}]}
    (scores / "shard-00000.json").write_text(json.dumps(manifest))
    (scores / "config.json").write_text(json.dumps(config or {"stage": "score"}))
    save_file({"down": np.zeros(3, np.float32), "up": np.array([1, weight], np.float32)}, model / "lora.safetensors")
    summary = {"root": str(root), "timings": {"pool": rate}, "win_rate": {"pickscore": {"rate": rate, "n": 4}}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "report.html").write_text(stamp)
    (model / "model.json").write_text(json.dumps({"kind": "lora", "fingerprint": stamp}))
    night = root / f"rescores/2026-01-01T{stamp[:6]}Z"
    night.mkdir(parents=True)
    (night / "config.json").write_text(json.dumps({"name": night.name, "report": f"rescores/{night.name}"}))
    return root


@pytest.fixture
def base(tmp_path) -> Path:
    return write_root(tmp_path / "base")


def test_the_same_with_other_times_and_file_names_is_no_difference(base, tmp_path):
    present = write_root(tmp_path / "present", stamp="1" * 12)
    (present / "scores/n3-a/pickscore-b/shard-00000-222222222222.parquet").write_bytes(b"no manifest names it")
    assert compare_roots(base, present) == []


@pytest.mark.parametrize(("change", "line"), [
    ({"rows": {**ROWS, "score": [1.0, float("nan"), 3.0000000000000004]}},
     "scores/n3-a/pickscore-b/shard-00000.parquet: column score differs in 1 rows, first in row 2: 3.0 and "
     "3.0000000000000004"),
    ({"rows": {**ROWS, "image": [b"one", b"twO", b"three"]}},
     "scores/n3-a/pickscore-b/shard-00000.parquet: column image differs in 1 rows, first in row 1: 3 bytes 74776f... "
     "and 3 bytes 74774f..."),
    ({"weight": 1.0000001}, "models/dpo-c/lora.safetensors: 1 of 2 tensors differ, the first is up"),
    ({"rate": 0.25}, "runs/figures-d/summary.json: win_rate.pickscore.rate is 0.5 and 0.25"),
    ({"config": {"stage": "score", "dtype": "float32"}},
     "scores/n3-a/pickscore-b/config.json: dtype is only in present")])
def test_one_difference_is_one_line(base, tmp_path, change, line):
    assert compare_roots(base, write_root(tmp_path / "present", **change)) == [line]


def test_another_id_is_a_difference_on_both_sides(base, tmp_path):
    present = write_root(tmp_path / "present")
    shutil.move(present / "models/dpo-c", present / "models/dpo-e")
    assert compare_roots(base, present) == [
        "only base: models/dpo-c/lora.safetensors", "only base: models/dpo-c/model.json",
        "only present: models/dpo-e/lora.safetensors", "only present: models/dpo-e/model.json"]


def test_missing_rows_are_a_difference(base, tmp_path):
    fewer = {name: values[:2] for name, values in ROWS.items()}
    assert compare_roots(base, write_root(tmp_path / "present", fewer)) == [
        "scores/n3-a/pickscore-b/shard-00000.parquet: 3 and 2 rows"]


def test_settings_that_were_added_with_a_default_are_no_difference():
    for line in ("runs/evaluate-1/config.json: concepts is only in present",
                 "runs/run-1/config.json: target.family is only in present",
                 "runs/run-1/config.json: target.prediction_type is only in present"):
        assert ADDED.fullmatch(line)
    assert not ADDED.fullmatch("runs/run-1/config.json: target.source is only in present")
