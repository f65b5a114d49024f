"""Steps of prefect.yaml: while deploying, and of a worker before it runs a flow."""

import os
import subprocess
from pathlib import Path

from hgdpo_core import __version__


def enter_checkout() -> dict[str, str]:
    """Work in the checkout of this package, wherever that is on this machine; else where the worker was started.

    Relative paths of a run (prompts, images, the default root) are then the same as in a shell there. Prefect's own
    step takes an absolute path, which differs between machines, and without a step it copies the folder for each run.
    """
    checkout = Path(__file__).resolve().parents[1]
    return {"directory": str(checkout if (checkout / "pyproject.toml").is_file() else Path(os.getcwd()))}


def set_environment(**variables: str) -> dict[str, str]:
    """Put these into the environment of the run's process, and of what it starts, before the flow is imported.

    For secrets: Prefect keeps a pull step as it is written and resolves its `{{ prefect.blocks.secret.name }}` when a
    run starts. Those in a deployment's `env` it resolves while deploying, and stores the secret itself.
    """
    os.environ.update(variables)
    return {}


def find_version() -> dict[str, str]:
    """While deploying: `version` for the deployments, `commit` in full, and `tag`, a version that an image may have.

    The version is git's description of the checkout; the package's own where it is not a checkout.
    """
    version = _git("describe", "--tags", "--always", "--dirty") or __version__
    return {"version": version, "commit": _git("rev-parse", "HEAD"), "tag": version.replace("+", "-").replace("/", "-")}


def _git(*arguments: str) -> str:
    """What git prints about the folder of this package; nothing outside a checkout of it, or without git."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return ""
    try:
        return subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True,
                              timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
