"""All tests marked slow, a file at a time: a file that has passed at this commit is not run again.

    python tests/slow.py [--fresh]      # or: make test-slow [FRESH=1]

State and summary lie in output/slow/. Nothing is skipped while tracked or new files are not committed.
"""

import argparse
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHOSEN = "slow and not gpu and not network"
UNCOMMITTED = " with uncommitted changes"
NO_TESTS = 5  # pytest's exit code


class SlowTestsError(Exception):
    """The tests could not be collected; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What a file's slow tests came to, and when and at which commit."""

    file: str
    commit: str
    began: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.failed == 0 and self.passed + self.skipped > 0

    def line(self, commit: str, began: str) -> str:
        """A row of the summary; one that an earlier call brought says so."""
        earlier = "" if self.began >= began else f"  of {self.began}"
        counts = f"{self.passed:4d} passed {self.failed:3d} failed {self.skipped:3d} skipped"
        return f"{self.file:<48s} {counts} {self.seconds:8.0f} s{earlier}"


def run_slow_tests(root: Path, *, fresh: bool = False) -> int:
    """Run what has not passed at this commit, write and print the summary; returns the exit code, 130 if interrupted.

    SlowTestsError where pytest cannot collect the tests.
    """
    location, commit, began = root / "output" / "slow", describe_commit(root), now()
    location.mkdir(parents=True, exist_ok=True)
    files, outcomes, interrupted = find_files(root), {}, False
    if not fresh and not commit.endswith(UNCOMMITTED):
        outcomes = {file: outcome for file, outcome in read_state(location, commit).items() if file in files}
    try:
        for file in files:
            if file not in outcomes or not outcomes[file].good:
                outcomes[file] = run_file(root, file, commit, location / "last.xml")
                write_state(location, outcomes)
    except KeyboardInterrupt:
        interrupted = True
    summary = summarise(files, outcomes, commit, began)
    (location / "summary.txt").write_text(summary)
    print(f"\n{summary}")
    if interrupted:
        return 130
    return 0 if all(outcome.good for outcome in outcomes.values()) else 1


# -- pytest


def find_files(root: Path) -> list[str]:
    """The files that have slow tests, relative to the root."""
    done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", CHOSEN], cwd=root, text=True,
                          capture_output=True)
    if done.returncode not in (0, NO_TESTS):
        raise SlowTestsError(f"pytest cannot collect the tests:\n{done.stdout[-4000:]}{done.stderr[-1000:]}")
    return sorted({line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line})


def run_file(root: Path, file: str, commit: str, result: Path) -> Outcome:
    """Run a file's slow tests in a process of their own; one that ends without a result counts as failed."""
    began, clock = now(), time.monotonic()
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", file, "-m", CHOSEN, f"--junitxml={result}"]
    print(f"\n== {file}", flush=True)
    code = subprocess.run(command, cwd=root).returncode
    counts = count_results(result)
    if counts["failed"] == 0 and (code != 0 or not result.exists()):
        counts["failed"] = 1
    return Outcome(file, commit, began, **counts, seconds=round(time.monotonic() - clock, 1))


def count_results(result: Path) -> dict[str, int]:
    """Passed, failed and skipped tests of a JUnit file; a test that fails and then errs at its end counts once."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    if not result.exists():
        return counts
    tests: dict[tuple[str, str], str] = {}
    for case in ElementTree.parse(result).getroot().iter("testcase"):
        name = case.get("classname", ""), case.get("name", "")
        kinds = {child.tag for child in case}
        came = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        if tests.get(name) != "failed":
            tests[name] = came
    for came in tests.values():
        counts[came] += 1
    return counts


# -- state and summary


def describe_commit(root: Path) -> str:
    """The commit's short hash, and whether the files are those of it."""
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    return commit + (UNCOMMITTED if _git(root, "status", "--porcelain") else "")


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, text=True, capture_output=True, check=True).stdout.strip()


def read_state(location: Path, commit: str) -> dict[str, Outcome]:
    """The outcomes at this commit of earlier calls, by file."""
    try:
        rows = [Outcome(**row) for row in json.loads((location / "state.json").read_text())]
    except (OSError, ValueError, TypeError):  # none yet, cut short, or of another version
        return {}
    return {row.file: row for row in rows if row.commit == commit}


def write_state(location: Path, outcomes: dict[str, Outcome]) -> None:
    """Replace the state in one step, so that a kill leaves the old one or the new one."""
    draft = location / "state.json.new"
    draft.write_text(json.dumps([asdict(outcome) for outcome in outcomes.values()], indent=1))
    draft.replace(location / "state.json")


def summarise(files: Sequence[str], outcomes: dict[str, Outcome], commit: str, began: str) -> str:
    """The text that a note quotes: commit, date, a line a file, the sum."""
    lines = [outcomes[file].line(commit, began) if file in outcomes else f"{file:<48s}    not run" for file in files]
    total = Outcome("all", commit, began, *(sum(getattr(one, name) for one in outcomes.values())
                                            for name in ("passed", "failed", "skipped", "seconds")))
    return "\n".join([f"slow tests at {commit}, begun {began}", *lines, total.line(commit, began), ""])


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="run also what has passed at this commit")
    try:
        return run_slow_tests(ROOT, fresh=parser.parse_args(arguments).fresh)
    except SlowTestsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
