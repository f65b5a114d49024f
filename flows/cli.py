"""The `hgdpo` command: the flows of this project, with the same parameters, from a terminal."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.caption_command import caption
from flows.pairs_command import pairs
from flows.personalise_command import personalise
from flows.score_commands import rescore, score
from flows.study_command import STUDY_COMMANDS
from flows.terminal import call_opened, open_store, plan_text
from hgdpo_core import __version__
from hgdpo_core.errors import HGDPOError, StoppedError, first_line
from hgdpo_core.progress import count_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 failed while working, 2 bad input, 130 stopped."""
    options = _parser().parse_args(arguments)
    _prepare_environment()
    if options.loads_libraries:
        from hgdpo_core.execution.imports import load_libraries

        load_libraries()
    try:
        return options.command(options)
    except (StoppedError, KeyboardInterrupt) as stop:
        how = str(stop) or "stopped"
        print(f"hgdpo: {how}; what is finished is kept, run the same command to continue", file=sys.stderr)
        return 130
    except HGDPOError as error:
        print(f"hgdpo: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"hgdpo: error: {type(error).__name__}: {first_line(error)}; what is finished is kept. The traceback is "
              f"in {_keep_traceback()}", file=sys.stderr)
        return 1


def _keep_traceback() -> Path:
    from hgdpo_core.storage.scratch import cache_folder

    log = cache_folder("logs") / f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}-{os.getpid()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(traceback.format_exc())  # not the command: an address in it may hold a secret
    return log


def _prepare_environment() -> None:
    """Settings that have an effect only before torch and transformers are imported.

    OpenMP's threads wait by spinning and so take the cores from each other once the machine has other work: generating
    figures on 2 cores beside a busy process ran at 1.7 images/s, and at 21 without spinning. Never spinning makes
    an idle machine half as fast; a short spin loses little in both cases.

    A temporary Prefect server keeps its database in a folder of this project, and reports nothing to anybody; the
    user's own Prefect is left as it is, and a server that their profile names is used.
    """
    from hgdpo_core.storage.scratch import cache_folder

    if "PREFECT_HOME" not in os.environ:
        home = cache_folder("prefect")
        with contextlib.suppress(OSError):  # a cache that cannot be written is named where the store or the hub uses it
            home.mkdir(parents=True, exist_ok=True)
            os.environ["PREFECT_HOME"] = str(home)
            os.environ.setdefault("PREFECT_PROFILES_PATH", str(Path.home() / ".prefect" / "profiles.toml"))
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for programmers, not for this command


def run(options: argparse.Namespace) -> int:
    """Run the whole method: fine-tuning, pool, ranking, LoRA, evaluation, report."""
    if options.plan_only:
        return plan(options)
    from flows.parameters import INPUTS, RUN, values_of
    from hgdpo_core.run import open_run

    inputs = {**values_of(options, INPUTS), "dry": False}
    opened = open_run(**inputs)  # bad input fails before Prefect starts, in one line
    from flows.full import hgdpo

    _print_summary(call_opened(hgdpo, values_of(options, RUN), open_run, inputs, opened), options.publish)
    return 0


def plan(options: argparse.Namespace) -> int:
    """Show what `run` would make, what exists, how long it takes and how large it gets; makes nothing."""
    from flows.parameters import INPUTS, values_of
    from hgdpo_core.plan import plan_run
    from hgdpo_core.plan.table import describe
    from hgdpo_core.run import open_run

    opened = open_run(**values_of(options, INPUTS), dry=True)
    if options.probe:
        print("hgdpo: timing a batch of each stage that has work to do: this loads the models", file=sys.stderr)
    planned = plan_run(opened, with_probe=options.probe)
    print(planned.model_dump_json(indent=1) if options.json else describe(planned))
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """Compare any two models or LoRA weights: win rates, defects, colours, a report."""
    from flows.parameters import EVALUATE, values_of
    from hgdpo_core.run.comparison import open_comparison, plan_comparison

    parameters = values_of(options, EVALUATE)
    not_inputs = ("study", "plan_only", "shard_runner")
    inputs = {name: value for name, value in parameters.items() if name not in not_inputs}
    opened = open_comparison(**inputs)  # bad input fails before Prefect starts, in one line
    if options.plan_only:
        rows = plan_comparison(opened)
        print(plan_text(opened.run_id, rows, rows if options.json else None))
        return 0
    from flows.evaluate import hgdpo_evaluate

    _print_summary(call_opened(hgdpo_evaluate, parameters, open_comparison, inputs, opened), options.publish)
    return 0


def ablate(options: argparse.Namespace) -> int:
    """Measure the paper's ablations from one pool: tables with intervals, beside the paper's numbers."""
    from flows.parameters import ABLATE, INPUTS, values_of
    from hgdpo_core.ablate.cost import plan_ablation
    from hgdpo_core.ablate.program import open_ablation

    settings = {name: getattr(options, name) for name in ("seeds", "worlds", "comparisons", "split")}
    inputs = {**values_of(options, INPUTS), "settings": settings}
    opened = open_ablation(**inputs)  # bad input fails before Prefect starts, in one line
    if options.plan_only:
        planned = plan_ablation(opened)
        rows = [{"work": name.replace("_", " "), "number": number} for name, number in planned.items()]
        print(plan_text(planned["ablation_id"], rows, planned if options.json else None))
        return 0
    from flows.ablate import hgdpo_ablate

    result = call_opened(hgdpo_ablate, values_of(options, ABLATE), open_ablation, inputs, opened)
    print()
    for claim in result["claims"]:
        print(f"{claim['world']:>6} world, {claim['text']}: {claim['verdict']} ({claim['measured']})")
    for name, location in result["artifacts"].items():
        print(f"{name}: {location}")
    return 0


def collect(options: argparse.Namespace) -> int:
    """Delete files that unfinished work left in a root."""
    from hgdpo_core.storage.garbage import collect_garbage

    store = open_store(options.root)
    planned = collect_garbage(store, dry_run=True)
    verb = "would" if options.dry_run else "will"
    print(f"{verb} remove {count_of(len(planned.files), 'file')} of {store.root}, {planned.bytes:,} bytes")
    for name in planned.files:
        print(name)
    if not options.dry_run:
        report = collect_garbage(store)
        print(f"removed {count_of(len(report.files), 'file')}, {report.bytes:,} bytes")
    return 0


def settings(options: argparse.Namespace) -> int:
    """Print every setting: its value in a preset, its unit and what it means."""
    from hgdpo_core.config.presets import INSTANTBOOTH
    from hgdpo_core.rendering.settings import adapter_table, preset_table

    print(preset_table(options.preset).text())
    if options.preset in INSTANTBOOTH:
        print(f"\nOf hgdpo personalise:\n\n{adapter_table(options.preset).text()}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write a run's LoRA, for diffusers, A1111 and ComfyUI, and a model card to a folder."""
    from hgdpo_core.export import check_push, export_run, push_folder

    folder = Path(options.to)
    if options.push:
        check_push(options.push, folder, public=options.public)
    store = open_store(options.root)
    for path in export_run(store, folder, options.run_id, fused=options.fused, target=options.target):
        print(path)
    if options.push:
        print(push_folder(folder, options.push, public=options.public))
    return 0


def _publish(summary: dict[str, Any], folder: Path) -> str:
    """Copy `summary.json` and `report.html` out of the store into a local folder; returns the report's path."""
    store = open_store(summary["root"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "report.html"):
        (folder / name).write_bytes(store.read_bytes(f"runs/{summary['run_id']}/{name}"))
    return str((folder / "report.html").resolve())


def _print_summary(summary: dict[str, Any], publish: str | None) -> None:
    from hgdpo_core.rendering.parts import describe_identity, describe_rate

    report = _publish(summary, Path(publish)) if publish else summary["artifacts"]["report"]
    print("\n" + "  ".join(f"{stage} {seconds:.0f} s" for stage, seconds in summary["timings"].items()))
    if summary.get("found"):
        print(f"Reused; the times above are those of the run that made them: {', '.join(summary['found'])}")
    for scorer, rate in summary["win_rate"].items():
        print(f"{scorer}: win rate of the tuned model {describe_rate(rate)}")
    for scorer, change in summary["defect_rate"].items():
        print(f"{scorer}: {100 * change['target']:.1f} % of the target's images are defective, "
              f"{100 * change['tuned']:.1f} % of the tuned model's")
    for judge, change in summary.get("identity", {}).items():
        print(f"{judge}: the person is nearer by the tuned model on {describe_rate(change['win_rate'])}; "
              f"{describe_identity(change)}")
    for warning in summary.get("warnings", ()):
        print(f"warning: {warning['message']}")
    if "lora" in summary["artifacts"]:
        print(f"LoRA:   {summary['artifacts']['lora']}")
    print(f"Report: {report}")


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": run, "plan": plan, "ablate": ablate, "evaluate": evaluate, "personalise": personalise, "rescore": rescore,
    "score": score, "caption": caption, "export": export, "pairs": pairs, "settings": settings, "gc": collect}


class _Command(argparse.ArgumentParser):
    """A command that gets its options only when it is called: their definitions cost a second of imports."""

    name = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The options, as argparse's."""
        from flows.parameters import COMMAND_LINES

        for parameter in COMMAND_LINES.get(self.name, ()):  # one of further commands has none itself
            parameter.add_to(self)
        return super().parse_known_args(args, namespace)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hgdpo", description="Better human images from your own model (HG-DPO).")
    parser.add_argument("--version", action="version", version=f"hgdpo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_Command)
    for name, function in COMMANDS.items():
        _add_command(commands, name, function)
    _study(commands)
    return parser


def _study(commands: Any) -> None:
    """`hgdpo study create`, `hgdpo study serve`, ...: each with a function in STUDY_COMMANDS and options of its own.

    None of them needs torch, and a page should be there in a second.
    """
    study = commands.add_parser("study", help="Ask people which of two images they prefer.")
    parts = study.add_subparsers(required=True, metavar="command", parser_class=_Command)
    for name, function in STUDY_COMMANDS.items():
        _add_command(parts, f"study {name}", function, loads_libraries=False)


def _add_command(commands: Any, name: str, function: Callable[[argparse.Namespace], int], *,
                 loads_libraries: bool = True) -> None:
    command = commands.add_parser(name.split()[-1], help=(function.__doc__ or "").splitlines()[0])
    command.name = name
    command.set_defaults(command=function, loads_libraries=loads_libraries)


if __name__ == "__main__":
    sys.exit(main())
