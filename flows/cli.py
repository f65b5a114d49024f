"""The `hgdpo` command: the flows of this project, with the same parameters, from a terminal."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.caption_command import add_caption_command
from flows.score_commands import add_score_commands
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
    parameters = _parameters(options)
    _check(parameters, dry=options.plan)
    from flows.full import hgdpo
    from flows.server import call_flow
    from hgdpo_core.plan.table import RunPlan

    summary = call_flow(hgdpo, **parameters, plan_only=options.plan, shard_runner=options.shard_runner)
    if options.plan:
        _print_plan(RunPlan.model_validate(summary["plan"]), as_json=False)
        return 0
    report = summary["artifacts"]["report"]
    if options.publish:
        report = _publish(summary, Path(options.publish))
    _print_summary(summary, report)
    return 0


def plan(options: argparse.Namespace) -> int:
    """What `run` would make and find, how long it takes and how large it gets; nothing is made."""
    from hgdpo_core.plan import plan_run
    from hgdpo_core.run import open_run

    parameters = _parameters(options)
    opened = open_run(parameters.pop("preset"), parameters.pop("root"), dry=True, **parameters)
    if options.probe:
        print("hgdpo: timing a batch of each stage that has work to do: this loads the models", file=sys.stderr)
    _print_plan(plan_run(opened, with_probe=options.probe), as_json=options.json)
    return 0


def _print_plan(run_plan: Any, *, as_json: bool) -> None:
    from hgdpo_core.plan.table import describe

    print(run_plan.model_dump_json(indent=1) if as_json else describe(run_plan))


def evaluate(options: argparse.Namespace) -> int:
    """Compare any two models or LoRA weights: win rates, defects, colours, a report."""
    from hgdpo_core.comparison_run import open_comparison, plan_comparison

    names = ("preset", "root", "tuned", "target", "base", "prompts", "scorers", "images_per_prompt", "lora_weight",
             "target_lora_weight", "lora_weights")
    parameters = {**{name: getattr(options, name) for name in names}, "overrides": dict(options.set or [])}
    run = open_comparison(**parameters)  # bad input fails before Prefect starts, in one line
    if options.plan:
        print(json.dumps(plan_comparison(run), indent=1))
        return 0
    from flows.evaluate import hgdpo_evaluate
    from flows.server import call_flow

    summary = call_flow(hgdpo_evaluate, **parameters, shard_runner=options.shard_runner)
    report = _publish(summary, Path(options.publish)) if options.publish else summary["artifacts"]["report"]
    _print_summary(summary, report)
    return 0


def ablate(options: argparse.Namespace) -> int:
    """The paper's comparisons from one pool: tables with intervals, the paper's numbers beside."""
    from hgdpo_core.ablate.cost import plan_ablation
    from hgdpo_core.ablate.program import open_ablation

    parameters = _parameters(options)
    given = {"seeds": options.seeds, "worlds": options.worlds, "comparisons": options.comparisons,
             "split": options.split}
    settings = {name: value for name, value in given.items() if value is not None}
    rest = {name: value for name, value in parameters.items() if name not in ("preset", "root")}
    # Bad input fails before Prefect starts, in one line.
    ablation = open_ablation(parameters["preset"], parameters["root"], settings=settings, **rest)
    if options.plan:
        print(json.dumps(plan_ablation(ablation), indent=1))
        return 0
    from flows.ablate import hgdpo_ablate
    from flows.server import call_flow

    result = call_flow(hgdpo_ablate, **parameters, **settings, shard_runner=options.shard_runner)
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

    report = collect_garbage(Store(options.root or default_root()), dry_run=options.dry_run)
    print(f"{'would remove' if options.dry_run else 'removed'} {len(report.files)} files, {report.bytes:,} bytes")
    for name in report.files:
        print(name)
    return 0


def export(options: argparse.Namespace) -> int:
    """Put a run's LoRA, for diffusers and for A1111 and ComfyUI, and its model card into a folder."""
    from hgdpo_core.export import check_push, export_run, push_folder
    from hgdpo_core.run import default_root
    from hgdpo_core.storage import Store

    folder = Path(options.to)
    if options.push:
        check_push(options.push, folder, public=options.public)
    for path in export_run(Store(options.root or default_root()), folder, options.run_id, fused=options.fused,
                           target=options.target):
        print(path)
    if options.push:
        print(push_folder(folder, options.push, public=options.public))
    return 0


def _check(parameters: dict[str, Any], *, dry: bool) -> None:
    """Fail on bad input before Prefect starts, in one line."""
    from hgdpo_core.run import open_run

    parameters = dict(parameters)
    open_run(parameters.pop("preset"), parameters.pop("root"), **parameters, dry=dry)


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


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    return {"preset": options.preset, "root": options.root, "prompts": options.prompts, "target": options.target,
            "images": options.images, "overrides": dict(options.set or [])}


def _setting(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting: expected name=value, as dpo.beta=1000")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers: expected for example 0.25,0.5,1") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hgdpo", description="Better human images from your own model (HG-DPO).")
    commands = parser.add_subparsers(required=True, metavar="command")
    for function in (run, plan, ablate):
        command = commands.add_parser(function.__name__, help=(function.__doc__ or "").splitlines()[0])
        command.add_argument("--preset", default="figures", help="figures (built in, CPU) or sd15 (the paper's)")
        command.add_argument("--root", help="where all results go, any fsspec URL; default $HGDPO_ROOT or output/full")
        command.add_argument("--prompts", help="txt, csv, tsv, jsonl or parquet, path or URL; or a data set")
        command.add_argument("--target", help="your model: diffusers folder, .safetensors file or hub id")
        command.add_argument("--images", help="captioned images to fine-tune the model on first: a folder, or "
                             "webdataset .tar or .parquet files; path, URL or pattern")
        command.add_argument("--set", action="append", type=_setting, metavar="NAME=VALUE",
                             help="override a setting, for example --set dpo.beta=1000; repeatable")
        command.set_defaults(command=function)
        if function is run:
            command.add_argument("--publish", metavar="FOLDER", help="also copy summary.json and report.html there")
        if function is ablate:
            _add_ablation_options(command)
        if function is not plan:
            command.add_argument("--shard-runner", default="auto", choices=["auto", "in_process", "deployment"],
                                 help="deployment: make shards on the workers of `make up`; default: here")
            command.add_argument("--plan", action="store_true", help="say what would be done, and stop")
        else:
            command.add_argument("--probe", action=argparse.BooleanOptionalAction, default=False,
                                 help="time a batch of each stage on this machine; this loads the models")
            command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _add_evaluate(commands.add_parser("evaluate", help=(evaluate.__doc__ or "").splitlines()[0]))
    add_score_commands(commands, _setting)
    add_caption_command(commands)
    _add_export(commands.add_parser("export", help=(export.__doc__ or "").splitlines()[0]))
    garbage = commands.add_parser("gc", help=(collect.__doc__ or "").splitlines()[0])
    garbage.add_argument("--root")
    garbage.add_argument("--dry-run", action="store_true", help="list, remove nothing")
    garbage.set_defaults(command=collect)
    return parser


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_id", nargs="?", help="may be left out where the root holds one finished run")
    command.add_argument("--root", help="where the run's results are")
    command.add_argument("--to", required=True, metavar="FOLDER", help="a README.md already in it is kept")
    command.add_argument("--fused", action="store_true", help="also a whole pipeline with the LoRA merged in")
    command.add_argument("--target", help="with --fused: where the target model lies now, if it moved")
    command.add_argument("--push", metavar="OWNER/NAME", help="also upload to the Hugging Face Hub, privately; the "
                                                              "token is the environment variable HF_TOKEN")
    command.add_argument("--public", action="store_true", help="with --push: for everyone to see")
    command.set_defaults(command=export)


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    model = "diffusers folder, .safetensors file or hub id"
    command.add_argument("--tuned", required=True, metavar="MODEL", help=f"{model}, or a LoRA (folder or .safetensors)")
    command.add_argument("--target", metavar="MODEL", help=f"held against the tuned one: {model}, or a LoRA on --base")
    command.add_argument("--base", metavar="MODEL", help="the model that wears the LoRAs; default: the target")
    command.add_argument("--lora-weight", type=float, help="weight of a LoRA; default: the preset's")
    command.add_argument("--target-lora-weight", type=float, help="weight of the target's LoRA; default: --lora-weight")
    command.add_argument("--lora-weights", type=_numbers, metavar="WEIGHT,...",
                         help="further weights to try the tuned LoRA at, as 0.25,0.5,1")
    command.add_argument("--prompts", help="prompt file: txt, csv, tsv, jsonl or parquet; default: the preset's")
    command.add_argument("--scorers", type=lambda text: text.split(","), metavar="NAME[=SOURCE],...",
                         help="judges, separated by commas; default: the preset's")
    command.add_argument("--images-per-prompt", type=int, help="images of each prompt by each model; default 1")
    command.add_argument("--preset", default="figures", help="sampler and prompts: figures or sd15 (the paper's)")
    command.add_argument("--root", help="where all results go, any fsspec URL; default $HGDPO_ROOT or output/full")
    command.add_argument("--set", action="append", type=_setting, metavar="NAME=VALUE",
                         help="override a setting, for example --set sampler.steps=20; repeatable")
    command.add_argument("--publish", metavar="FOLDER", help="also copy summary.json and report.html there")
    command.add_argument("--shard-runner", default="auto", choices=["auto", "in_process", "deployment"],
                         help="deployment: make shards on the workers of `make up`; default: here")
    command.add_argument("--plan", action="store_true", help="say what would be drawn and found, and stop")
    command.set_defaults(command=evaluate)


def _add_ablation_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seeds", type=int, help="trainings of every arm; default 3")
    command.add_argument("--worlds", nargs="+", metavar="WORLD", help="plain, tinted; default: both for figures, plain "
                         "otherwise")
    command.add_argument("--comparisons", nargs="+", metavar="NAME", help="pool_size, loser_rank, dataset_size, "
                         "statistics, beta, lora_weight; default all")
    command.add_argument("--split", help="figures prompts to measure on: test or validation")


if __name__ == "__main__":
    sys.exit(main())
