"""The `hgdpo` command: the flows of this project, with the same parameters, from a terminal."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flows.caption_command import caption
from flows.score_commands import rescore, score
from hgdpo_core.errors import HGDPOError, StoppedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 failed while working, 2 bad input."""
    options = _parser().parse_args(arguments)
    _prepare_environment()
    _load_libraries()
    try:
        return options.command(options)
    except (StoppedError, KeyboardInterrupt) as stop:
        how = str(stop) or "stopped"
        print(f"hgdpo: {how}; what is finished is kept, run the same command to go on", file=sys.stderr)
        return 130
    except HGDPOError as error:
        print(f"hgdpo: error: {error}", file=sys.stderr)
        return 2


def _prepare_environment() -> None:
    """Settings that count only if they stand before torch and transformers are imported.

    OpenMP's threads wait by spinning and so take the cores from each other once the machine has other work: sampling
    figures on 2 cores beside a busy process ran at 1.7 images/s, and at 21 without spinning. Never spinning makes
    an idle machine half as fast; a short spin loses little in both cases.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for programmers, not for this command


def _load_libraries() -> None:
    from hgdpo_core.execution.imports import load_libraries

    load_libraries()


def run(options: argparse.Namespace) -> int:
    """The whole method."""
    if options.plan_only:
        return plan(options)
    from flows.parameters import RUN, values_of
    from hgdpo_core.run import open_run
    from tasks.handover import handed_over

    inputs = {**_inputs(options), "dry": False}
    opened = open_run(**inputs)  # bad input fails before Prefect starts, in one line
    from flows.full import hgdpo
    from flows.server import call_flow

    with handed_over(open_run, inputs, opened):
        summary = call_flow(hgdpo, **values_of(options, RUN))
    report = summary["artifacts"]["report"]
    if options.publish:
        report = _publish(summary, Path(options.publish))
    _print_summary(summary, report)
    return 0


def plan(options: argparse.Namespace) -> int:
    """What `run` would make and what exists, how long it takes and how large it gets; nothing is made."""
    from hgdpo_core.plan import plan_run
    from hgdpo_core.run import open_run

    opened = open_run(**_inputs(options), dry=True)
    if options.probe:
        print("hgdpo: timing a batch of each stage that has work to do: this loads the models", file=sys.stderr)
    _print_plan(plan_run(opened, with_probe=options.probe), as_json=options.json)
    return 0


def _print_plan(run_plan: Any, *, as_json: bool) -> None:
    from hgdpo_core.plan.table import describe

    print(run_plan.model_dump_json(indent=1) if as_json else describe(run_plan))


def evaluate(options: argparse.Namespace) -> int:
    """Compare any two models or LoRA weights: win rates, defects, colours, a report."""
    from flows.parameters import EVALUATE, values_of
    from hgdpo_core.comparison_run import open_comparison, plan_comparison
    from tasks.handover import handed_over

    parameters = values_of(options, EVALUATE)
    inputs = {name: value for name, value in parameters.items() if name not in ("plan_only", "shard_runner")}
    opened = open_comparison(**inputs)  # bad input fails before Prefect starts, in one line
    if options.plan_only:
        print(json.dumps(plan_comparison(opened), indent=1))
        return 0
    from flows.evaluate import hgdpo_evaluate
    from flows.server import call_flow

    with handed_over(open_comparison, inputs, opened):
        summary = call_flow(hgdpo_evaluate, **parameters)
    report = _publish(summary, Path(options.publish)) if options.publish else summary["artifacts"]["report"]
    _print_summary(summary, report)
    return 0


def ablate(options: argparse.Namespace) -> int:
    """The paper's comparisons from one pool: tables with intervals, the paper's numbers beside."""
    from flows.parameters import ABLATE, values_of
    from hgdpo_core.ablate.cost import plan_ablation
    from hgdpo_core.ablate.program import open_ablation
    from tasks.handover import handed_over

    settings = {name: getattr(options, name) for name in ("seeds", "worlds", "comparisons", "split")}
    inputs = {**_inputs(options), "settings": settings}
    opened = open_ablation(**inputs)  # bad input fails before Prefect starts, in one line
    if options.plan_only:
        print(json.dumps(plan_ablation(opened), indent=1))
        return 0
    from flows.ablate import hgdpo_ablate
    from flows.server import call_flow

    with handed_over(open_ablation, inputs, opened):
        result = call_flow(hgdpo_ablate, **values_of(options, ABLATE))
    print()
    for claim in result["claims"]:
        print(f"{claim['world']:>6} world, {claim['text']}: {claim['verdict']} ({claim['measured']})")
    for name, place in result["artifacts"].items():
        print(f"{name}: {place}")
    return 0


def collect(options: argparse.Namespace) -> int:
    """Remove what no manifest names."""
    from hgdpo_core.run import default_root
    from hgdpo_core.storage import Store
    from hgdpo_core.storage.garbage import collect_garbage

    store = Store(default_root() if options.root is None else options.root)
    planned = collect_garbage(store, dry_run=True)
    print(f"would remove {len(planned.files)} files of {store.root}, {planned.bytes:,} bytes")
    for name in planned.files:
        print(name)
    if not options.dry_run:
        report = collect_garbage(store)
        print(f"removed {len(report.files)} files, {report.bytes:,} bytes")
    return 0


def export(options: argparse.Namespace) -> int:
    """Put a run's LoRA, for diffusers and for A1111 and ComfyUI, and its model card into a folder."""
    from hgdpo_core.export import check_push, export_run, push_folder
    from hgdpo_core.run import default_root
    from hgdpo_core.storage import Store

    folder = Path(options.to)
    if options.push:
        check_push(options.push, folder, public=options.public)
    store = Store(default_root() if options.root is None else options.root)
    for path in export_run(store, folder, options.run_id, fused=options.fused, target=options.target):
        print(path)
    if options.push:
        print(push_folder(folder, options.push, public=options.public))
    return 0


def _publish(summary: dict[str, Any], folder: Path) -> str:
    """Copy `summary.json` and `report.html` out of the store into a local folder; returns the report's path."""
    from hgdpo_core.storage import Store

    store = Store(summary["root"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "report.html"):
        (folder / name).write_bytes(store.read_bytes(f"runs/{summary['run_id']}/{name}"))
    return str((folder / "report.html").resolve())


def _print_summary(summary: dict[str, Any], report: str) -> None:
    seconds = summary["timings"]
    print("\n" + "  ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items()))
    if summary.get("found"):
        print(f"Found, with the seconds it took to make them: {', '.join(summary['found'])}")
    for scorer, rate in summary["win_rate"].items():
        if rate["rate"] is None:
            print(f"{scorer}: no prompt told the models apart ({rate['ties']} ties)")
        else:
            print(f"{scorer}: tuned model wins {100 * rate['rate']:.1f} % (95 % interval {100 * rate['ci_low']:.1f} to "
                  f"{100 * rate['ci_high']:.1f} %; {rate['wins']} wins, {rate['losses']} losses, {rate['ties']} ties)")
    for scorer, change in summary["defect_rate"].items():
        print(f"{scorer}: {100 * change['target']:.1f} % of the target's images are defective, "
              f"{100 * change['tuned']:.1f} % of the tuned model's")
    for warning in summary.get("warnings", ()):
        print(f"warning: {warning['message']}")
    if "lora" in summary["artifacts"]:
        print(f"LoRA:   {summary['artifacts']['lora']}")
    print(f"Report: {report}")


def _inputs(options: argparse.Namespace) -> dict[str, Any]:
    from flows.parameters import INPUTS, values_of

    return values_of(options, INPUTS)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": run, "plan": plan, "ablate": ablate, "evaluate": evaluate, "rescore": rescore, "score": score,
    "caption": caption, "export": export, "gc": collect}


class _Command(argparse.ArgumentParser):
    """A command that gets its options when it is the one that was typed: their definitions cost a second of imports."""

    name = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The options, as argparse's."""
        from flows.parameters import COMMAND_LINES

        for parameter in COMMAND_LINES[self.name]:
            parameter.add_to(self)
        return super().parse_known_args(args, namespace)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hgdpo", description="Better human images from your own model (HG-DPO).")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_Command)
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=(function.__doc__ or "").splitlines()[0])
        command.name = name
        command.set_defaults(command=function)
    return parser


if __name__ == "__main__":
    sys.exit(main())
