"""The two automations that make a lost run retryable: one that went silent, and one that never left Pending.

Prefect notices by itself that a flow's process died under a living worker. It does not notice that both died, or that
a worker died before it started the process: such a run stays as it is, and its Retry stays hidden.

    python -m deployments.automations      # create or update both on the server that PREFECT_API_URL names
"""

import argparse
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from prefect.automations import Automation
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture

SILENT_SECONDS = 600
"""Heartbeats come every 30 s. A window shorter than a restart of the server would mark live runs as Crashed."""
PENDING_SECONDS = 600
FLOWS = ["hgdpo", "hgdpo-*"]


def automations(silent_seconds: float = SILENT_SECONDS, pending_seconds: float = PENDING_SECONDS) -> list[Automation]:
    """Both, for the flows of this project alone."""
    ended = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Cancelled", "Crashed")}
    return [
        Automation(
            name="hgdpo: crash silent runs",
            description="A run whose heartbeats stop was killed together with its worker.",
            trigger=_missing(after={"prefect.flow-run.heartbeat"}, within=silent_seconds,
                             expect=ended | {"prefect.flow-run.heartbeat", "prefect.flow-run.AwaitingRetry"}),
            actions=[_crash(f"No heartbeat for {silent_seconds:.0f} s: the run and its worker are gone. Retry makes "
                            "what is missing.")]),
        Automation(
            name="hgdpo: crash runs stuck in Pending",
            description="A run whose worker died before it could start the run's process.",
            trigger=_missing(after={"prefect.flow-run.Pending", "prefect.flow-run.Submitting",
                                    "prefect.flow-run.InfrastructurePending"}, within=pending_seconds,
                             expect=ended | {"prefect.flow-run.Running", "prefect.flow-run.Scheduled",
                                             "prefect.flow-run.AwaitingConcurrencySlot", "prefect.flow-run.Retrying",
                                             "prefect.flow-run.AwaitingRetry", "prefect.flow-run.Cancelling"}),
            actions=[_crash(f"Pending for {pending_seconds:.0f} s: its worker is gone. Retry starts it elsewhere.")]),
    ]


def ship(requested: list[Automation] | None = None) -> None:
    """Create them on the configured server; existing ones of the same name are updated."""
    for automation in requested or automations():
        try:
            found: Any = Automation.read(name=automation.name)
        except ValueError:
            automation.create()
        else:
            automation.id = found.id
            automation.update()


def _crash(message: str) -> ChangeFlowRunState:
    return ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=message, force=False)


def _missing(*, after: set[str], expect: set[str], within: float) -> EventTrigger:
    return EventTrigger(
        after=after, expect=expect, posture=Posture.Proactive, threshold=1, within=timedelta(seconds=within),
        match={"prefect.resource.id": "prefect.flow-run.*"},  # pyright: ignore[reportArgumentType]
        match_related={"prefect.resource.role": "flow",
                       "prefect.resource.name": FLOWS},  # pyright: ignore[reportArgumentType]
        for_each={"prefect.resource.id"})


def main(arguments: Sequence[str] | None = None) -> None:
    """Ship them with windows that fit the machines: a pod that waits for a node is Pending all the time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--silent-seconds", type=float, default=SILENT_SECONDS, help="silent for so long: Crashed")
    parser.add_argument("--pending-seconds", type=float, default=PENDING_SECONDS, help="Pending for so long: Crashed")
    options = parser.parse_args(arguments)
    ship(automations(options.silent_seconds, options.pending_seconds))


if __name__ == "__main__":
    main()
