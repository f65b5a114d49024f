"""Malformed inputs by seed, as whole small runs: each ends in one clear line or in a right result."""

import json
import math
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import decoded_rows, tiny_parameters

from hgdpo_core.errors import HGDPOError, StoppedError
from hgdpo_core.execution.runner import InProcess
from hgdpo_core.pipeline import run_all, write_report
from hgdpo_core.run import open_run

CASES, DEFAULT_CASES = 360, 60
PATIENCE_SECONDS, DEADLINE_SECONDS = 20.0, 120  # a long but valid run is stopped, a hang is an error
SPARE_BYTES = 6 * 2**30
SMALL = {"sft.max_steps": 1, "dpo.max_steps": 1, "sampler.steps": 1, "pool.images_per_prompt": 2,
         "pool.prompts_per_shard": 1}
VALUES: list[Any] = [
    None, True, False, "", " ", "x", "nan", "-1", "1e400", math.nan, math.inf, -math.inf, -1, 0, 0.5, -0.0,
    1e308, 1e-320,
    2**31, 2**63, 2**65, -2**65, [], [2, 3], [None], {}, {"a": 1}, {"source": None}, "../x", "a\nb", "\x00", "é" * 300]
BYTES = [b"", b"\x00" * 64, b"\xff\xfe", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0\nquit\n", b"{", b"[" * 100_000, b"null",
         b'{"a": NaN}', b"PAR1\x00\x00PAR1", b"a,b\n1\n2,3,4\n", "prompt\nä".encode("latin-1"),
         "prompt\na woman\n".encode("utf-16"), b"\xef\xbb\xbfa woman\na man\n", b"a woman\x00\na man\n", b"\n\n  \n",
         b"x" * 300_000, b'"unclosed\na woman\n', b'{"prompt": 3}\n', b'{"prompt": null}\n{"prompt": "a"}\n', b"<html>"]



class Hang(BaseException):
    """Not an Exception: those are caught where a file is read."""


Parameters = dict[str, Any]
Mutation = Callable[[random.Random, Path, Parameters], None]
"""Spoils the inputs that lie in a folder, or the parameters that name them, in location."""


# -- what is spoiled


def spoil_settings(rng: random.Random, location: Path, parameters: Parameters) -> None:
    names = sorted(_leaves(open_run(**parameters, dry=True).config.model_dump(mode="json")))
    name = rng.choice(names)
    name = rng.choice([name, name, name, name.rpartition(".")[0] or name, f"{name}.more", name[:-1]])
    parameters["overrides"] = parameters["overrides"] | {name: rng.choice(VALUES)}


def spoil_weights(rng: random.Random, location: Path, parameters: Parameters) -> None:
    folder = location / rng.choice(["target", "target", "judge"])
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    if rng.random() < 0.5:
        spoil_tensors(rng, rng.choice(weights))
    elif rng.random() < 0.5:
        spoil_json(rng, rng.choice([path for path in files if path.suffix == ".json"]))
    else:
        spoil_file(rng, rng.choice(files))


def spoil_store(rng: random.Random, location: Path, parameters: Parameters) -> None:
    files = sorted(path for path in (location / "root").rglob("*") if path.is_file())
    chosen = rng.choice(files)
    spoil_json(rng, chosen) if chosen.suffix == ".json" and rng.random() < 0.5 else spoil_file(rng, chosen)


def spoil_prompts(rng: random.Random, location: Path, parameters: Parameters) -> None:
    name = rng.choice(["prompts.txt", "held-out.txt"])
    suffix = rng.choice([".txt", ".csv", ".tsv", ".jsonl", ".json", ".parquet", ""])
    renamed = (location / name).rename((location / name).with_suffix(suffix) if suffix else location / "prompts")
    data = rng.choice(BYTES)
    renamed.write_bytes(data if rng.random() < 0.7 else renamed.read_bytes() + data)
    if rng.random() < 0.2:
        spoil_file(rng, renamed)
    if name == "prompts.txt":
        parameters["prompts"] = str(renamed)
    else:
        parameters["overrides"] = parameters["overrides"] | {"evaluation.prompts": {"source": str(renamed)}}


def spoil_images(rng: random.Random, location: Path, parameters: Parameters) -> None:
    folder = location / "images"
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(["0.png", "1.txt", "new.png", "new.jpg", "new.txt", "._0.png", "a\\b.png", "new.gif",
                           "0.json", "metadata.jsonl", "metadata.csv", "new.tar", "new.parquet"])
        if rng.random() < 0.3:
            mode = rng.choice(["1", "I;16", "RGBA", "P", "LA", "CMYK"])
            size = rng.choice([(8, 8), (40, 8), (1, 1), (9, 90)])
            Image.new(mode, size).save(folder / f"odd-{rng.randint(0, 9)}.{'tif' if mode == 'CMYK' else 'png'}")
        elif (folder / name).exists() and rng.random() < 0.5:
            spoil_file(rng, folder / name)
        else:
            (folder / name).write_bytes(rng.choice(BYTES))
    if rng.random() < 0.2:
        parameters["images"] = rng.choice([str(folder / "0.png"), f"{folder}/*.tar", f"{folder}/{{0..3}}.tar", "",
                                           f"{folder}/set-{{000000000..999999999}}.tar", str(folder / "nothing")])


def spoil_root(rng: random.Random, location: Path, parameters: Parameters) -> None:
    (location / "file").write_text("no folder")
    (location / "loop").symlink_to(location / "loop")
    (location / "stranger").mkdir()
    (location / "stranger" / "notes.txt").write_text("not ours")
    parameters["root"] = rng.choice([
        "", " ", "s3://", "s3:///x", "s3://Bucket_/x", "file://host/x", "file://", "http://host/x", "memory://x",
        "~nobody/x", str(location / "file"), str(location / "file" / "below"), str(location / "loop"), "/proc/nowhere",
        "/dev/null/x", "a\x00b", str(location / ("x" * 300)), str(location / "stranger"), str(location / "a b ü"), f"file://{location}/with%20escape",
        f"{location}//double", str(location / "images"), str(location / "target"), "x://y", "::", "C:\\x", "gs://bucket/x"])


def spoil_tensors(rng: random.Random, file: Path) -> None:
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    change = rng.randrange(9)
    if change == 1:
        tensors[f"{name}.more"] = tensor
    elif change == 2:
        tensors[name] = torch.full_like(tensor, math.nan) if tensor.is_floating_point() else tensor
    elif change == 3:
        tensors[name] = tensor[..., :-1].contiguous() if tensor.ndim else tensor[None]
    elif change == 4:
        tensors[name] = tensor.to(torch.int8)
    elif change == 5:
        tensors[name] = tensor.sum()
    elif change == 6:
        tensors[name] = tensor.double()
    elif change == 7:
        tensors = {f"model.{other}": each for other, each in tensors.items()}
    elif change == 8:
        tensors = {}
    save_file(tensors, file, metadata={"format": "pt"})


def spoil_json(rng: random.Random, file: Path) -> None:
    data = json.loads(file.read_text())
    if isinstance(data, dict) and data and rng.random() < 0.8:
        name = rng.choice(sorted(data))
        if rng.random() < 0.4:
            del data[name]
        else:
            data[name] = rng.choice([value for value in VALUES if not isinstance(value, float) or math.isfinite(value)])
    else:
        data = rng.choice([[], None, 3, "x", {}, [data], {"a": data}])
    file.write_text(json.dumps(data))


def spoil_file(rng: random.Random, file: Path) -> None:
    data = file.read_bytes()
    change = rng.randrange(9)
    file.unlink()
    if change == 1:
        file.mkdir()
    elif change == 2:
        file.symlink_to(file.parent / "nothing")
    elif change == 3:
        file.symlink_to(file)
    elif change == 4:
        os.mkfifo(file)
    elif change == 5:
        file.write_bytes(data[:rng.randrange(max(1, len(data)))])
    elif change == 6:
        position = rng.randrange(max(1, len(data)))
        file.write_bytes(data[:position] + bytes([rng.randrange(256)]) * 4 + data[position + 4:])
    elif change == 7:
        file.write_bytes(rng.choice(BYTES))
    elif change == 8:
        file.write_bytes(data + rng.choice(BYTES))


def _leaves(data: Any, prefix: str = "") -> Iterator[str]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


SPOILERS: dict[str, Mutation] = {"settings": spoil_settings, "weights": spoil_weights, "store": spoil_store,
                                 "prompts": spoil_prompts, "images": spoil_images, "root": spoil_root}


# -- the runs


@pytest.fixture(scope="module")
def clean(tmp_path_factory, target_folder, judge_folder) -> tuple[Path, Parameters, dict[str, Any]]:
    """A folder with all inputs and the root of a finished run, its parameters, and its rows."""
    location = tmp_path_factory.mktemp("clean")
    shutil.copytree(target_folder, location / "target")
    shutil.copytree(judge_folder, location / "judge")
    parameters = tiny_parameters(location, location / "target", location / "judge")
    for name, count in (("prompts.txt", 2), ("held-out.txt", 2)):
        (location / name).write_text("".join((location / name).read_text().splitlines(keepends=True)[:count]))
    parameters["overrides"] |= SMALL
    parameters["root"] = str(location / "root")
    run_all(open_run(**parameters))
    return location, parameters, decoded_rows(parameters["root"])


def moved(value: Any, before: Path, after: Path) -> Any:
    """Parameters with the paths of another folder."""
    return json.loads(json.dumps(value).replace(str(before), str(after)))


@contextmanager
def limits() -> Iterator[None]:
    """A hang or a waste of memory is an error."""
    def too_long(*_: Any) -> None:
        raise Hang(f"still not done after {DEADLINE_SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(DEADLINE_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("case", [*range(DEFAULT_CASES), *(pytest.param(case, marks=pytest.mark.slow)
                                                           for case in range(DEFAULT_CASES, CASES))])
def test_one_clear_line_or_a_right_result(case, clean, tmp_path, monkeypatch):
    location, parameters, rows = clean
    kind = list(SPOILERS)[case % len(SPOILERS)]
    inputs = tmp_path / "inputs"
    skipped = () if kind == "store" else shutil.ignore_patterns("root")
    shutil.copytree(location, inputs, ignore=skipped or None)
    monkeypatch.chdir(tmp_path)
    parameters = moved(parameters, location, inputs)
    SPOILERS[kind](random.Random(case), inputs, parameters)

    ends = time.monotonic() + PATIENCE_SECONDS
    with limits():
        try:
            run = open_run(**parameters)
            result = run_all(run, InProcess(lambda: time.monotonic() > ends))
            summary = write_report(run, result).summary
        except StoppedError:
            return
        except HGDPOError as error:
            message = str(error)
            assert message.strip() and len(message.splitlines()) == 1 and len(message) < 1500, message
            return
    rates = summary["win_rate"]["pickscore"]
    assert rates["wins"] + rates["ties"] + rates["losses"] == rates["n"] == len(run.evaluation_prompts.prompts)
    assert summary["triplets"] + summary["rejected"] == len(run.prompts.prompts)
    assert all(math.isfinite(value) for row in result.made.lora.log for value in row.values())
    if kind in ("store", "root"):
        assert {folder: found for folder, found in decoded_rows(run.store.root).items() if folder in rows} == rows
