"""The same tiny run by an earlier commit and by the present code, on this machine: are ids, rows and weights the same?

    python -m tests.compare_commits [BASE] [--keep FOLDER]

Ids up to triplets have golden values (tests/golden/ids.json); latents, LoRAs and rows have bytes of their own on every
machine, so both commits make them here. Prints what differs and exits 1. Reads both roots without any code of this
project, so that moves and renamings cannot hide a difference.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors import safe_open

BASE = "42be5bc"
HERE = Path(__file__).resolve().parents[1]
DATA_NAME = re.compile(r"(shard-\d{5,})-[0-9a-f]{12}(?=\.parquet)")
NIGHT = re.compile(r"\d{4}-\d\d-\d\dT\d{6}Z(-\d+)?")
MANIFEST = re.compile(r"shard-\d{5,}\.json")
CHANGING = {"timings", "seconds", "started_at", "finished_at", "created_at", "code_version", "libraries", "night",
            "found"}
"""Names in JSON files whose values are times, versions, or what an earlier try had left."""
FILE_FACTS = {"file", "bytes", "sha256"}
"""Of a manifest: rows are compared themselves, their Parquet file is its writer's."""
HASHES = {"model.json": {"fingerprint"}, "complete.json": {"files"}}
"""Of files whose content is compared itself: a kohya file has its metadata in another order each time, a checkpoint's
state.pt holds seconds."""
UNREAD = {".html", ".md", ".pt"}
"""Pages people read may say the same in other words; checkpoints hold what the weights beside them show."""

ADDED = re.compile(r"only present: latents/images-\S+/means\.json"  # stages with a recipe now
                   r"|only present: triplets/\S+/means\.json"
                   r"|runs/\S+/summary\.json: lora_id is only in present"
                   r"|\S+/(config|images)\.json: "
                   r"(\S+\.)?(global_batch_size|attention|compile|steps|race|autocast|objective|alignprop|pairs|concepts"
                   r"|family|prediction_type) is only in present")
"""What the present code writes beside all that the base wrote."""

# -- the two roots


def compare_roots(base: Path, present: Path) -> list[str]:
    """One line a difference; [] where both hold the same folders, ids, rows, tensors and numbers."""
    files = [{_neutral(path.relative_to(root).as_posix(), root): path for path in _held_files(root)}
             for root in (base, present)]
    found = [f"only {who}: {name}" for who, mine, other in (("base", *files), ("present", *files[::-1]))
             for name in sorted(mine.keys() - other.keys())]
    for name in sorted(files[0].keys() & files[1].keys()):
        found += [f"{name}: {line}" for line in _compare_files(files[0][name], files[1][name], base, present)]
    return [line for line in found if not ADDED.fullmatch(line)]


def _held_files(root: Path) -> Iterator[Path]:
    """All files but data that no manifest names."""
    named = {path.parent / json.loads(path.read_bytes())["file"] for path in root.rglob("shard-*.json")
             if MANIFEST.fullmatch(path.name)}
    return (path for path in root.rglob("*")
            if path.is_file() and (path in named or not DATA_NAME.search(path.name)))


def _compare_files(base: Path, present: Path, base_root: Path, present_root: Path) -> Iterator[str]:
    if base.suffix == ".parquet":
        yield from _compare_tables(base, present)
    elif base.suffix == ".safetensors":
        yield from _compare_tensors(base, present)
    elif base.suffix == ".json":
        values = [_read_json(path, root) for path, root in ((base, base_root), (present, present_root))]
        yield from _compare_values(values[0], values[1])
    elif base.suffix not in UNREAD and base.read_bytes() != present.read_bytes():
        yield "other bytes"


def _compare_tables(base: Path, present: Path) -> Iterator[str]:
    tables = [pq.read_table(path) for path in (base, present)]
    if tables[0].schema != tables[1].schema:
        yield f"other columns: {tables[0].schema.names} and {tables[1].schema.names}, or other types"
        return
    if tables[0].num_rows != tables[1].num_rows:
        yield f"{tables[0].num_rows} and {tables[1].num_rows} rows"
        return
    for column in tables[0].schema.names:
        pairs = zip(*(table[column].to_pylist() for table in tables), strict=True)
        rows = [row for row, (old, new) in enumerate(pairs) if repr(old) != repr(new)]  # repr: NaN is itself
        if rows:
            values = [_shown(table[column][rows[0]].as_py()) for table in tables]
            yield f"column {column} differs in {len(rows)} rows, first in row {rows[0]}: {values[0]} and {values[1]}"


def _compare_tensors(base: Path, present: Path) -> Iterator[str]:
    (old, old_notes), (new, new_notes) = (_read_tensors(path) for path in (base, present))
    if old.keys() != new.keys():
        yield f"other tensors: {sorted(old.keys() ^ new.keys())[:3]}"
    if old_notes != new_notes:
        yield f"other metadata: {old_notes} and {new_notes}"
    differing = [name for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    if differing:
        yield f"{len(differing)} of {len(old)} tensors differ, the first is {differing[0]}"


def _read_tensors(path: Path) -> tuple[dict[str, tuple], dict | None]:
    """Name -> type, shape, bytes; and the metadata."""
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        return {name: (str(t.dtype), t.shape, t.tobytes()) for name, t in tensors.items()}, file.metadata()


def _read_json(path: Path, root: Path) -> Any:
    value = json.loads(_neutral(path.read_text(), root))
    if MANIFEST.fullmatch(path.name):
        value = {name: item for name, item in value.items() if name not in FILE_FACTS}
        value["inputs"] = [shard["key"] for shard in value["inputs"]]
    for name in HASHES.get(path.name, ()):
        value.pop(name, None)
    return value


def _neutral(text: str, root: Path) -> str:
    """Without what names the root, the day or the bytes of a Parquet file."""
    return NIGHT.sub("<night>", DATA_NAME.sub(r"\1", text.replace(str(root), "<root>")))


def _compare_values(old: Any, new: Any, location: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted((old.keys() | new.keys()) - CHANGING):
            here = f"{location}.{name}" if location else name
            if name in old and name in new:
                yield from _compare_values(old[name], new[name], here)
            else:
                yield f"{here} is only in {'base' if name in old else 'present'}"
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for position, pair in enumerate(zip(old, new, strict=True)):
            yield from _compare_values(*pair, f"{location}[{position}]")
    elif repr(old) != repr(new):
        yield f"{location} is {_shown(old)} and {_shown(new)}"


def _shown(value: Any) -> str:
    text = f"{len(value)} bytes {value[:8].hex()}..." if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


# -- the two runs

INPUTS = """
import sys
from pathlib import Path
import tiny
from hgdpo_core.figures.dataset import write_image_folder
location = Path(sys.argv[1])
tiny.save_target(location / "target")
tiny.save_judge(location / "judge")
tiny.save_judge(location / "other-judge", seed=1)
write_image_folder(location / "images", 4, seed=0)
"""


def make_inputs(location: Path, base: Path, environment: Mapping[str, str]) -> None:
    """Tiny models, images and prompts; by the base's code, and the same files for both."""
    location.mkdir(parents=True)
    paths = os.pathsep.join([str(base), str(base / "tests")])
    _call([sys.executable, "-c", INPUTS, str(location)], {**environment, "PYTHONPATH": paths}, location)
    prompts = [f"(a woman:1.3) in a [red] top, number {i}" for i in range(5)] + ["a red top, " * 7 + "BREAK a boy"]
    (location / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (location / "held-out.txt").write_text("".join(f"a (man:0.8) in a blue top, number {i}\n" for i in range(4)))


def make_database(environment: Mapping[str, str], location: Path) -> None:
    """Prefect's database, before a server is waited for: on a busy machine making it takes over a minute."""
    _call([sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"], environment, location)


def commands(location: Path, root: Path) -> dict[str, list[str]]:
    """What both commits are asked to do, in this order."""
    judges = [{"name": name, "source": str(location / "judge")} for name in ("pickscore", "tinted")]
    common = {"target.dtype": "float32", "target.prompt_syntax": "a1111", "target.negative_prompt": "(blurry:1.2)",
              "sampler.width": 32, "sampler.height": 32, "sampler.steps": 2, "pool.prompts_per_shard": 4,
              "evaluation.scorers": judges, "evaluation.prompt_syntax": "a1111", "evaluation.images_per_prompt": 3}
    training = {f"{kind}.{name}": value for kind in ("sft", "dpo") for name, value in {
        "max_steps": 2, "batch_size": 2, "flip": True, "learning_rate": 0.01, "warmup_steps": 0, "validation_every": 2,
        "validation_images": 1, "optimizer": "adamw", "mixed_precision": "no"}.items()}
    run = {**common, **training, "scorer.source": str(location / "judge"), "pool.images_per_prompt": 3,
           "dpo.gradient_accumulation_steps": 2, "evaluation.prompts": {"source": str(location / "held-out.txt")}}
    models, rooted = ["--target", str(location / "target")], ["--root", str(root)]
    return {
        "run": ["run", *rooted, *models, "--prompts", str(location / "prompts.txt"), "--images",
                str(location / "images"), *_settings(run)],
        "evaluate": ["evaluate", *rooted, *models, "--tuned", str(location / "lora.safetensors"), "--prompts",
                     str(location / "held-out.txt"), "--lora-weight", "0.5", "--lora-weights", "0.25,1.5",
                     *_settings({**common, "sampler.latent_normalisation": True})],
        "rescore": ["rescore", *rooted, "--scorer", f"pickscore={location / 'other-judge'}"]}


def _settings(values: Mapping[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in ("--set", f"{name}={json.dumps(value)}")]


def run_commit(checkout: Path, location: Path, root: Path, environment: Mapping[str, str]) -> None:
    """All commands by the code of a checkout; the first commit's LoRA is the one that both evaluate."""
    for name, arguments in commands(location, root).items():
        start = time.monotonic()
        code = "import sys; from flows.cli import main; sys.exit(main())"
        _call([sys.executable, "-c", code, *arguments], {**environment, "PYTHONPATH": str(checkout)}, location)
        print(f"  hgdpo {name}: {time.monotonic() - start:.0f} s", flush=True)
        if name == "run" and not (location / "lora.safetensors").exists():
            lora = next(root.glob("models/dpo-*/pytorch_lora_weights.safetensors"))
            shutil.copyfile(lora, location / "lora.safetensors")


def _call(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
    done = subprocess.run(command, env=dict(environment), cwd=folder, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    if done.returncode:
        what, code = " ".join(command[1:4])[:80], environment.get("PYTHONPATH")
        sys.exit(f"{what} with PYTHONPATH={code} failed:\n{done.stdout[-4000:]}")


def quiet_environment(work: Path) -> dict[str, str]:
    """One thread, no network, a Prefect and a cache of its own, as the Makefile has it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "HGDPO_"))}
    return kept | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(work / "cache"),
        "PREFECT_HOME": str(work / "prefect"), "PREFECT_PROFILES_PATH": str(work / "prefect" / "profiles.toml"),
        "PREFECT_API_URL": "", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A work tree of the commit, removed at the end."""
    subprocess.run(["git", "-C", HERE, "worktree", "add", "--quiet", "--detach", folder, commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", folder], check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both, compare, print; 0 where nothing differs, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", nargs="?", default=BASE, help=f"commit to compare with; default {BASE}")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave both roots there, to look into")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary).resolve()
        roots = [(options.keep.resolve() if options.keep else work) / name for name in ("base-root", "present-root")]
        environment = quiet_environment(work)
        with checked_out(options.base, work / "base") as base:
            make_inputs(work / "inputs", base, environment)
            make_database(environment, work)
            for checkout, root in zip((base, HERE), roots, strict=True):
                print(f"{'base ' + options.base if checkout == base else 'present code'}:", flush=True)
                run_commit(checkout, work / "inputs", root, environment)
        found = compare_roots(*roots)
        count = sum(path.is_file() for path in roots[0].rglob("*"))
    print("\n".join(found) if found else f"no difference in {count} files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
