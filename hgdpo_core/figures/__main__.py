"""Train all networks of the figures setting from scratch, on a CPU, without a download."""

import argparse
from pathlib import Path

from hgdpo_core.errors import ConfigError

from .make.stages import STAGES, Run, run_stages


def main(arguments: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(prog="python -m hgdpo_core.figures", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the weights, metrics.json and README.md")
    parser.add_argument("--work", type=Path, help="folder for checkpoints (default: <output>-work beside the output)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated subset of %(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full training; 0.01 is a quick trial")
    options = parser.parse_args(arguments)
    work = options.work or options.output.with_name(f".{options.output.name}-work")
    run = Run(options.output, work, seed=options.seed, scale=options.scale)
    try:
        return run_stages(run, tuple(options.stages.split(",")))
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
