"""Train the figures world from nothing: `python -m hgdpo_core.figures`.

Six stages, each reading what the ones before it wrote:

    tokenizer    -> target/tokenizer
    vae          -> target/vae
    drawn_judge  -> drawn_judge/ in the work folder: a judge that has seen drawings only
    target       -> target/ (complete pipeline)
    inspector    -> inspector/
    judge        -> judge/, the judge of drawings trained on with the target's pictures

A stage keeps its checkpoint in a work folder named by a hash of its settings and of the files it reads, and leaves
`done.json` there when it has finished. A stage that is done is not done again, one that was killed goes on.
"""

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from hgdpo_core.errors import ConfigError

from . import inspector as make_inspector
from . import judge as make_judge
from . import target as make_target
from . import vae as make_vae
from .card import write_card
from .evaluation import evaluate_inspector, evaluate_judge, evaluate_target, evaluate_vae
from .loop import Plan, read_progress
from .tokenizer import TARGET_TOKENS, train_tokenizer

STAGES = ("tokenizer", "vae", "drawn_judge", "target", "inspector", "judge")
PLANS = {
    "vae": make_vae.PLAN,
    "drawn_judge": make_judge.PLAN,
    "target": make_target.PLAN,
    "inspector": make_inspector.PLAN,
    "judge": make_judge.CALIBRATION,
}
EXAMPLES = {
    "vae": make_vae.PICTURES,
    "drawn_judge": make_judge.PAIRS,
    "target": make_target.PICTURES,
    "inspector": make_inspector.PAIRS,
    "judge": make_judge.GENERATED_PAIRS,
}
TOKENIZER_FOLDER = "target/tokenizer"
MIB = 2**20
MAX_MIB = 20


@dataclass(frozen=True)
class Run:
    """Where one training run writes, and how much of the full training it does (`scale` 1.0 is all)."""

    output: Path
    work: Path
    seed: int = 0
    scale: float = 1.0

    def scaled(self, count: int, least: int) -> int:
        return max(least, round(count * self.scale))

    def plan(self, stage: str) -> Plan:
        plan = PLANS[stage]
        # Small trials also take small batches, or the first step would be most of their time.
        return replace(plan, steps=self.scaled(plan.steps, 2), batch=min(plan.batch, self.scaled(1000, 4)))

    def examples(self, stage: str) -> int:
        """Pairs or pictures that are drawn before the training begins."""
        return self.scaled(EXAMPLES[stage], 16) if stage in EXAMPLES else 0

    @property
    def samples(self) -> int:
        """Pictures of each evaluation. A real training is evaluated in full, however short."""
        return 256 if self.scale >= 0.1 else 4


def run_tokenizer(run: Run, work: Path) -> dict:
    return {"words": len(train_tokenizer(run.output / TOKENIZER_FOLDER, max_tokens=TARGET_TOKENS))}


def run_vae(run: Run, work: Path) -> dict:
    folder, pictures, measured = run.output / "target" / "vae", run.examples("vae"), 2 * run.samples
    make_vae.train_vae(folder, run.plan("vae"), pictures=pictures, measured=measured, seed=run.seed, work=work)
    return evaluate_vae(make_vae.load_vae(folder), run.samples)


def run_drawn_judge(run: Run, work: Path) -> dict:
    vae = make_vae.load_vae(run.output / "target" / "vae")
    make_judge.train_judge(
        run.work / "drawn_judge",
        run.output / TOKENIZER_FOLDER,
        vae,
        run.plan("drawn_judge"),
        pairs=run.examples("drawn_judge"),
        seed=run.seed,
        work=work,
    )
    return evaluate_judge(run.work / "drawn_judge", vae, run.samples)


def run_target(run: Run, work: Path) -> dict:
    vae = make_vae.load_vae(run.output / "target" / "vae")
    pictures = run.examples("target")
    make_target.train_target(
        run.output / "target", vae, run.plan("target"), pictures=pictures, seed=run.seed, work=work
    )
    return {}


def run_inspector(run: Run, work: Path) -> dict:
    vae = make_vae.load_vae(run.output / "target" / "vae")
    pairs = run.examples("inspector")
    make_inspector.train_inspector(
        run.output / "inspector", vae, run.plan("inspector"), pairs=pairs, seed=run.seed, work=work
    )
    return evaluate_inspector(run.output / "inspector", vae, run.samples)


def run_judge(run: Run, work: Path) -> dict:
    vae, target = make_vae.load_vae(run.output / "target" / "vae"), run.output / "target"
    make_judge.calibrate_judge(
        run.output / "judge",
        run.work / "drawn_judge",
        target,
        vae,
        run.plan("judge"),
        pairs=run.examples("judge"),
        seed=run.seed,
        work=work,
    )
    found = evaluate_judge(run.output / "judge", vae, run.samples, target)
    return {**found, "target": evaluate_target(target, run.output / "judge", run.output / "inspector", run.samples)}


RUNNERS: dict[str, Callable[[Run, Path], dict]] = {
    "tokenizer": run_tokenizer,
    "vae": run_vae,
    "drawn_judge": run_drawn_judge,
    "target": run_target,
    "inspector": run_inspector,
    "judge": run_judge,
}
# The files that each stage's training depends on, and the one by which its result is recognised.
TOKENIZER_FILE = f"{TOKENIZER_FOLDER}/tokenizer.json"
VAE_FILE = "target/vae/diffusion_pytorch_model.safetensors"
DRAWN_JUDGE_FILE = "drawn_judge/model.safetensors"
UNET_FILE = "target/unet/diffusion_pytorch_model.safetensors"
INSPECTOR_FILE = "inspector/model.safetensors"
READS = {
    "tokenizer": (),
    "vae": (),
    "drawn_judge": (VAE_FILE, TOKENIZER_FILE),
    "target": (VAE_FILE, TOKENIZER_FILE),
    "inspector": (VAE_FILE,),
    "judge": (VAE_FILE, TOKENIZER_FILE, DRAWN_JUDGE_FILE, UNET_FILE),
}
WRITES = {
    "tokenizer": TOKENIZER_FILE,
    "vae": VAE_FILE,
    "drawn_judge": DRAWN_JUDGE_FILE,
    "target": UNET_FILE,
    "inspector": INSPECTOR_FILE,
    "judge": "judge/model.safetensors",
}
# A new inspector makes the judge's metrics stale (they hold the target's), but not its training.
EVALUATES = {"judge": (INSPECTOR_FILE,)}


def locate(run: Run, name: str) -> Path:
    """Where a stage's file lies: all ship but the judge of drawings."""
    return (run.work if name == DRAWN_JUDGE_FILE else run.output) / name


def fingerprints(stage: str, names: tuple[str, ...], run: Run) -> dict[str, str]:
    """The sha256 of each of the files, which earlier stages must have written."""
    for name in names:
        if not locate(run, name).exists():
            raise FileNotFoundError(
                f"stage {stage!r} reads {locate(run, name)}, which is missing: "
                f"run the stages {', '.join(STAGES)} in order"
            )
    return {name: hashlib.sha256(locate(run, name).read_bytes()).hexdigest() for name in names}


def training_settings(stage: str, run: Run) -> dict:
    """What a stage's training is given: its settings, and the files it reads."""
    plan = asdict(run.plan(stage)) if stage in PLANS else {}
    inputs = fingerprints(stage, READS[stage], run)
    settings = {"stage": stage, "seed": run.seed, "scale": run.scale, "examples": run.examples(stage)}
    return {**settings, **plan, "inputs": inputs}


def written(stage: str, run: Run) -> dict[str, str]:
    """The sha256 of what a stage has written, or nothing: another seed may have written over it since."""
    path = locate(run, WRITES[stage])
    return {WRITES[stage]: hashlib.sha256(path.read_bytes()).hexdigest()} if path.exists() else {}


def run_stage(stage: str, run: Run) -> bool:
    """Run one stage unless it is done; returns whether it ran."""
    settings = training_settings(stage, run)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    work = run.work / f"{stage}-{digest}"
    done = work / "done.json"
    evaluated_by = fingerprints(stage, EVALUATES.get(stage, ()), run)
    record = json.loads(done.read_text()) if done.exists() else {}
    fresh = record.get("evaluated_by") == evaluated_by and record.get("wrote") == written(stage, run)
    if not fresh:
        work.mkdir(parents=True, exist_ok=True)
        metrics = RUNNERS[stage](run, work)
        machine = {"threads": torch.get_num_threads(), "machine": platform.machine()}
        training = {**settings, **read_progress(work / "checkpoint.pt"), **machine}
        wrote = written(stage, run)
        record = {"training": training, "metrics": metrics, "evaluated_by": evaluated_by, "wrote": wrote}
        done.write_text(json.dumps(record, indent=1))
    collect_metrics(stage, record, run.output)
    return not fresh


def collect_metrics(stage: str, record: dict, output: Path) -> None:
    """Put a stage's record into `metrics.json` and write the model card anew."""
    path = output / "metrics.json"
    metrics = json.loads(path.read_text()) if path.exists() else {}
    metrics = {**metrics, stage: record}
    path.write_text(json.dumps(metrics, indent=1) + "\n")
    write_card(output / "README.md", metrics)


def run_stages(run: Run, stages: tuple[str, ...] = STAGES) -> list[str]:
    """Run the named stages in order; returns those that were not done before."""
    unknown = set(stages) - set(STAGES)
    if unknown:
        raise ConfigError(f"stages must be among {', '.join(STAGES)}; got {', '.join(sorted(unknown))}")
    run.output.mkdir(parents=True, exist_ok=True)
    run.work.mkdir(parents=True, exist_ok=True)
    (run.work / ".gitignore").write_text("*\n")
    ran = [stage for stage in STAGES if stage in stages and run_stage(stage, run)]
    size = sum(path.stat().st_size for path in run.output.rglob("*") if path.is_file()) / MIB
    if size > MAX_MIB:
        raise ValueError(
            f"{run.output} must stay under {MAX_MIB} MiB to ship in the package; it has {size:.1f} MiB"
        )
    return ran
