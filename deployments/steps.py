"""Steps of a worker before it runs a flow."""

import os
from pathlib import Path


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
