"""Create or update the automations of automations.yaml on the server that PREFECT_API_URL names.

    python -m deployments.automations [--silent-seconds 600] [--pending-seconds 600]

`prefect automation create --from-file` would create them again each time; this leaves one of each.
"""

import argparse
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from prefect.automations import Automation

FILE = Path(__file__).with_name("automations.yaml")
SILENT_SECONDS = 600
PENDING_SECONDS = 600
SHIPPED_WINDOW = "600 s"


def automations(silent_seconds: float = SILENT_SECONDS, pending_seconds: float = PENDING_SECONDS) -> list[Automation]:
    """Those of the file, in its order, with these windows: of the run that went silent, of the one stuck in Pending."""
    read = [Automation.model_validate(one) for one in yaml.safe_load(FILE.read_text())["automations"]]
    for automation, seconds in zip(read, (silent_seconds, pending_seconds), strict=False):
        trigger: Any = automation.trigger
        action: Any = automation.actions[0]
        trigger.within = timedelta(seconds=seconds)
        action.message = action.message.replace(SHIPPED_WINDOW, f"{seconds:.0f} s")
    return read


def ship(requested: list[Automation] | None = None) -> None:
    """Create them on the configured server. Existing ones of the same name are updated; what ships off is left alone.

    The user fills in and turns on what ships off, and their changes are kept.
    """
    for automation in requested or automations():
        try:
            found: Any = Automation.read(name=automation.name)
        except ValueError:
            automation.create()
            continue
        if automation.enabled:
            automation.id = found.id
            automation.update()


def main(arguments: Sequence[str] | None = None) -> None:
    """Ship them with windows that fit the machines: a pod that waits for a node is Pending all the time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--silent-seconds", type=float, default=SILENT_SECONDS, help="silent for so long: Crashed")
    parser.add_argument("--pending-seconds", type=float, default=PENDING_SECONDS, help="Pending for so long: Crashed")
    options = parser.parse_args(arguments)
    ship(automations(options.silent_seconds, options.pending_seconds))


if __name__ == "__main__":
    main()
