"""`hgdpo personalise`."""

import argparse

from flows.terminal import call_opened, plan_text


def personalise(options: argparse.Namespace) -> int:
    """Train an adapter on images of people, for evaluate --concepts (InstantBooth), beside the frozen target."""
    from flows.parameters import PERSONALISE, values_of
    from hgdpo_core.personalise import open_personalise, plan_personalise

    parameters = values_of(options, PERSONALISE)
    inputs = {name: value for name, value in parameters.items() if name not in ("plan_only", "shard_runner")}
    opened = open_personalise(**inputs)  # bad input fails before Prefect starts, in one line
    if options.plan_only:
        rows = plan_personalise(opened)
        print(plan_text(opened.run_id, rows, rows if options.json else None))
        return 0
    from flows.personalise import hgdpo_personalise

    summary = call_opened(hgdpo_personalise, parameters, open_personalise, inputs, opened)
    print(f"\nImages of people: {summary['used']:,} used of {summary['images']:,}")
    for reason, number in summary["refused"].items():
        print(f"Refused: {number:,}: {reason}")
    print(f"Adapter: {summary['artifacts']['adapter']}\nCompare with it: {summary['evaluate']}")
    return 0
