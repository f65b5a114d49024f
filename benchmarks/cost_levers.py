"""What cheaper pools cost in win rate: fewer solver steps, and racing, in the figures setting.

    python -m benchmarks.cost_levers --root output/levers    # win rates: an hour or two on 2 cores
    python -m benchmarks.cost_levers --time 64               # seconds of pools of 64 prompts alone, minutes

Each lever makes a pool of its own, trains a LoRA on it several times, and evaluates on the 512 held-out prompts with
the sampler of the evaluation, which no lever changes. Stop it whenever you like: what is made is found again.

Cost is counted in solver steps, 1 is the whole pool. `--time` measures it, in a folder of its own on an idle machine:
decoding and scoring predicted images costs too, in this small setting more than at the size of SD 1.5.
Win rates are of the tuned model against the target, over all prompts and trainings, with 95 % intervals that resample
both. "Score gap" is the mean difference of winner and loser by the ranking scorer.
"""

import argparse
import tempfile
from typing import Any, NamedTuple

import numpy as np

from hgdpo_core.ablate.result import win_rate_estimate
from hgdpo_core.config import RunConfig
from hgdpo_core.config.presets import build_config
from hgdpo_core.models.racing import relative_cost
from hgdpo_core.pipeline import make_pool, run_all
from hgdpo_core.run import open_run
from hgdpo_core.stages.triplets import TripletStage

WHOLE = "whole pool"
LEVERS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    "7 steps": {"pool.steps": 7},
    "5 steps": {"pool.steps": 5},
    "one cut": {"pool.race": "5:6"},
    "two cuts": {"pool.race": "3:12,6:4"},
    "N=40, two cuts": {"pool.images_per_prompt": 40, "pool.race": "3:16,6:6"},
}


class Lever(NamedTuple):
    """What a lever cost and brought."""

    name: str
    steps: float
    gap: float
    gains: dict[str, np.ndarray]
    """Score of the tuned model over the target by scorer, float64 [trainings, prompts]."""


def measure(name: str, settings: dict[str, Any], options: argparse.Namespace) -> Lever:
    """Run the method with a lever, once for each training seed; finished steps are found."""
    gains: dict[str, list[list[float]]] = {}
    triplets = config = None
    for seed in range(options.trainings):
        changes = {**dict(item.split("=", 1) for item in options.set), **settings, "dpo.seed": seed}
        run = open_run("figures", options.root, overrides=changes)
        result = run_all(run)
        assert result.made.ranked is not None  # every lever has a pool
        triplets, config = result.made.ranked.triplets, run.config
        for scorer, tuned in result.comparison.tuned_scores.items():
            gains.setdefault(scorer, []).append(np.subtract(tuned, result.comparison.target_scores[scorer]).tolist())
        rates = {scorer: rate.rate for scorer, rate in result.comparison.win_rates.items()}
        print(f"{name}, training {seed}: win rates {rates}", flush=True)
    assert triplets is not None and config is not None
    return Lever(name, _steps(config), _gap(triplets),
                 {scorer: np.array(rows) for scorer, rows in gains.items()})


def _steps(config: RunConfig) -> float:
    """Solver steps of all candidates of a prompt."""
    images, steps = config.pool.images_per_prompt, config.pool.sampler(config.sampler).steps
    return images * steps * relative_cost(config.pool.race, images, steps)


def print_seconds(prompts: int) -> None:
    """Seconds that each lever's pool of some prompts takes, loading left out, one after the other in one process."""
    seconds: dict[str, float] = {}
    for name, settings in LEVERS.items():
        with tempfile.TemporaryDirectory() as root:
            run = open_run("figures", root, overrides={**settings, "prompts.limit": prompts, "sft.max_steps": 1})
            pool = make_pool(run, run.target)
            seconds[name] = sum(manifest.seconds for manifest in pool.folder.manifests().values())
        print(f"{name}: {seconds[name]:.1f} s, {seconds[name] / seconds[WHOLE]:.2f} of the whole pool; "
              f"{_steps(run.config) / _steps(build_config('figures')):.2f} in steps", flush=True)


def _gap(triplets: TripletStage) -> float:
    tables = [triplets.folder.read(index, ["winner_score", "loser_score"]) for index in triplets.indices]
    return float(np.mean(np.concatenate([np.subtract(*(table[name].to_numpy() for name in table.column_names))
                                         for table in tables])))


def print_table(levers: list[Lever]) -> None:
    """The levers as Markdown, each compared with the whole pool."""
    whole = levers[0]
    scorers = list(whole.gains)
    columns = ("pool", "cost in steps", "score gap", *(f"{name}, %" for name in scorers))
    print(f"\n| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    for lever in levers:
        rates = [win_rate_estimate(lever.gains[name]).scaled(100) for name in scorers]
        cells = [f"{rate.value:.1f} ({rate.ci_low:.1f} to {rate.ci_high:.1f})" for rate in rates]
        print(f"| {lever.name} | {lever.steps / whole.steps:.2f} | "
              f"{lever.gap:.2f} ({100 * lever.gap / whole.gap:.0f} %) | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="output/levers")
    parser.add_argument("--trainings", type=int, default=3, help="trainings of each lever, with dpo.seed 0, 1, ...")
    parser.add_argument("--levers", nargs="+", choices=list(LEVERS), default=list(LEVERS))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings, of all levers")
    parser.add_argument("--time", type=int, metavar="PROMPTS", help="measure seconds instead, on so many prompts")
    options = parser.parse_args()
    if options.time is not None:
        print_seconds(options.time)
        return
    chosen = dict.fromkeys([WHOLE, *options.levers])
    print_table([measure(name, LEVERS[name], options) for name in chosen])


if __name__ == "__main__":
    main()
