"""Write prefect.yaml, automations.yaml and the Kubernetes template of this package where the user stands.

    python -m deployments.files [FOLDER]

For those who installed the wheel; a checkout has prefect.yaml at its root. A file that exists and differs is kept.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

FILES = ("prefect.yaml", "automations.yaml", "kubernetes.json")


def write(folder: Path) -> list[Path]:
    """Write the files; returns those that were there already with other contents, which stay."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for name in FILES:
        ours, there = Path(__file__).with_name(name).read_text(), folder / name
        if there.exists() and there.read_text() != ours:
            kept.append(there)
        else:
            there.write_text(ours)
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Write them; returns the exit code, 1 where one was kept."""
    parser = argparse.ArgumentParser(prog="python -m deployments.files", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), help="default: here")
    folder = parser.parse_args(arguments).folder
    kept = write(folder)
    if kept:
        print(f"error: kept {', '.join(map(str, kept))}, which differ from the package's: move them away to get those",
              file=sys.stderr)
    print(f"Next: python -m deployments.prepare; cd {folder.resolve()} && prefect deploy --all")
    return 1 if kept else 0


if __name__ == "__main__":
    sys.exit(main())
