"""The first ten minutes on a GPU: does everything run and agree with the CPU, then how fast is it beside plain loops.

    make gpu-check                                # the same as python -m benchmarks.gpu_check
    python -m benchmarks.gpu_check --minutes 20   # for a slower card

Stable Diffusion 1.5's exact architecture and PickScore's, with random weights that are made here: no network, no files.
Writes docs/gpu/<device>.json and a table beside it. Parts run in the order of their worth: one that fails does not end
the others, and one for which too little of the time is left is skipped with that reason. Exit code 1 where one failed.
Without a GPU a tiny version runs on the CPU in seconds and writes to output/gpu-check: it shows that the script runs.
"""

import argparse
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_check_parts as parts
from benchmarks.gpu_check_parts import Setting
from hgdpo_core.devices import default_device, device_name, free_memory
from hgdpo_core.errors import HGDPOError, first_line

MINUTES = 10.0
NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True)
class Part:
    """One piece of work: `run(setting)` returns its rows, in at most `seconds` on a GPU."""

    name: str
    seconds: float
    run: Callable[[Setting], list[parts.Row]]
    needs_gpu: bool = False


PARTS = (
    Part("pool shard", 120, parts.draw_shard),
    Part("images, GPU against CPU", 60, parts.compare_images),
    Part("scores, GPU against CPU", 90, parts.compare_scores),
    Part("latents", 45, parts.encode_latents),
    Part("DPO bf16, resumed", 60, partial(parts.train, kind="dpo", precision="bf16")),
    Part("SFT bf16, resumed", 90, partial(parts.train, kind="sft", precision="bf16")),
    Part("DPO pure bf16, resumed", 60, partial(parts.train, kind="dpo", precision="bf16", autocast=False)),
    Part("DPO fp16, resumed", 60, partial(parts.train, kind="dpo", precision="fp16"), True),
    Part("SFT fp16, resumed", 90, partial(parts.train, kind="sft", precision="fp16"), True),
    Part("attention", 30, parts.time_attention),
    Part("pool: eager diffusers loop", 60, partial(parts.time_pool, side="eager diffusers loop")),
    Part("pool: ours", 60, partial(parts.time_pool, side="ours")),
    Part("scoring", 60, parts.time_scoring),
    Part("DPO step", 60, parts.time_dpo_step),
    Part("pool: compiled diffusers loop", 90, partial(parts.time_pool, side="compiled diffusers loop"), True),
    Part("pool: ours compiled", 90, partial(parts.time_pool, side="ours compiled"), True),
)


@dataclass
class Result:
    """What became of a part: "ok", "failed" or "skipped", why, and its rows."""

    part: str
    status: str
    seconds: float = 0.0
    peak_gib: float | None = None
    reason: str = ""
    rows: list[parts.Row] = field(default_factory=list)


class _OutOfTime(BaseException):  # no Exception: code under way may not take it for an error of its own
    pass


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """_OutOfTime inside after that long, between two operations of Python."""
    def end(*_: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(part: Part, setting: Setting, left: float) -> Result:
    """A part in what is left of the time, on a GPU in its own."""
    if part.needs_gpu and not setting.on_gpu:
        return Result(part.name, "skipped", reason=NEEDS_GPU)
    limit = min(left, part.seconds) if setting.on_gpu else left
    if left < (part.seconds / 2 if setting.on_gpu else 0.1):
        return Result(part.name, "skipped", reason=f"takes up to {part.seconds:.0f} s, and {max(left, 0):.0f} s were "
                                                   "left: more with --minutes")
    free_memory()
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    result, start = Result(part.name, "ok"), time.monotonic()
    try:
        with _at_most(limit):
            result.rows = part.run(setting)
    except _OutOfTime:
        result.status, result.reason = "skipped", f"was not finished in {limit:.0f} s"
    except Exception as error:  # whatever it is, the other parts run
        result.status, result.reason = "failed", f"{type(error).__name__}: {first_line(error)}"
    result.seconds = round(time.monotonic() - start, 1)
    if setting.on_gpu:
        result.peak_gib = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    beyond = [row for row in result.rows if not row.holds]
    if beyond:
        result.status, result.reason = "failed", "; ".join(f"{row.what}: {row.value:.3g} is above {row.limit:g}"
                                                           for row in beyond)
    return result


@dataclass(frozen=True)
class Report:
    """All results, and where they are from."""

    setting: Setting
    results: list[Result]
    seconds: float

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"device": device_name(self.setting.device), "size": self.setting.size,
                                 "torch": torch.__version__, "cuda": torch.version.cuda,
                                 "measured": datetime.now(UTC).strftime("%Y-%m-%d"), "seconds": round(self.seconds)}
        if self.setting.on_gpu:
            properties = torch.cuda.get_device_properties(0)
            facts |= {"memory_gib": round(properties.total_memory / 2**30, 1),
                      "capability": f"{properties.major}.{properties.minor}"}
        return facts

    def to_json(self) -> dict[str, Any]:
        return {**self.facts, "parts": [asdict(result) for result in self.results]}

    def to_markdown(self) -> str:
        """The facts in a line, a table of the parts, one of all rows."""
        lines = [", ".join(f"{name} {value}" for name, value in self.facts.items()), "",
                 "| part | result | seconds | peak memory, GiB | why |", "|---|---|---|---|---|"]
        lines += [f"| {r.part} | {r.status} | {r.seconds:g} | {'-' if r.peak_gib is None else f'{r.peak_gib:g}'} | "
                  f"{r.reason.replace('|', '/')} |" for r in self.results]
        lines += ["", "| part | measured | value | unit | at most |", "|---|---|---|---|---|"]
        lines += [f"| {r.part} | {row.what} | {'-' if row.value is None else f'{row.value:.3g}'} | {row.unit} | "
                  f"{'-' if row.limit is None else f'{row.limit:g}'} |" for r in self.results for row in r.rows]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> Path:
        """<device>.json and <device>.md; the path of the former."""
        name = re.sub(r"[^a-z0-9]+", "-", self.facts["device"].lower()).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(self.to_markdown())
        path = folder / f"{name}.json"
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        return path


def check(setting: Setting, seconds: float, chosen: Sequence[Part] = PARTS) -> Report:
    """All parts, one after the other, a line for each as it ends."""
    start, results = time.monotonic(), []
    for part in chosen:
        result = run_part(part, setting, seconds - (time.monotonic() - start))
        results.append(result)
        print(f"{result.part}: {result.status}, {result.seconds:g} s{result.reason and f' ({result.reason})'}",
              flush=True)
    return Report(setting, results, time.monotonic() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print, write; 1 where a part failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts; default: 10")
    parser.add_argument("--output", type=Path, help="folder; default: docs/gpu, without a GPU output/gpu-check")
    options = parser.parse_args(arguments)
    try:
        device = default_device()
    except HGDPOError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    on_gpu = device == "cuda"
    if not on_gpu:
        print("torch sees no GPU: a tiny version runs on the CPU, to show that the script does; its times mean nothing")
    with tempfile.TemporaryDirectory() as name:
        report = check(Setting(device, "sd15" if on_gpu else "tiny", Path(name)), 60 * options.minutes)
    path = report.write(options.output or Path("docs/gpu" if on_gpu else "output/gpu-check"))
    print(f"\n{report.to_markdown()}\nwritten: {path}")
    return 1 if any(result.status == "failed" for result in report.results) else 0


if __name__ == "__main__":
    sys.exit(main())
