"""The paper's comparisons: what all arms have in common, one arm with one training seed, and the page."""

import io
from typing import Any

from PIL import Image
from prefect.logging import get_run_logger

from hgdpo_core.ablate.arms import Arm
from hgdpo_core.ablate.conclude import conclude
from hgdpo_core.ablate.cost import plan_ablation
from hgdpo_core.ablate.measure import run_arm
from hgdpo_core.ablate.program import Ablation, Shared, open_ablation, prepare_shared
from hgdpo_core.execution.runner import Runner
from hgdpo_core.progress import count_of
from hgdpo_core.rendering.parts import percent
from tasks.handover import take_opened
from tasks.options import stage_task
from tasks.ui import describe_row, show_image, show_table, show_text, stage_progress

SHOWN_PLOTS = 8


@stage_task("prepare ablation")
def prepare_ablation(**parameters: Any) -> Ablation:
    """The checked ablation; takes the parameters of `open_ablation`. Mistakes fail here, before a model loads."""
    ablation = take_opened(open_ablation, **parameters)
    plan = plan_ablation(ablation)
    get_run_logger().info("In %s: %s", ablation.run.store.root, describe_row(plan))
    show_table("ablation-plan", [plan], "All work, as if nothing existed yet")
    return ablation


@stage_task("shared")
def make_shared(ablation: Ablation, runner: Runner) -> Shared:
    """One fine-tuned target, one pool with its scores, the target's evaluation images, for all arms."""
    shared = prepare_shared(ablation, stage_progress, runner)
    get_run_logger().info("Pool %s: %s; target's evaluation: %s", shared.pool.pool_id,
                          count_of(shared.pool.images, "image"), shared.target_images.pool_id)
    return shared


@stage_task("arm", "{label}, {arm.world} world, seed {seed}")
def measure(shared: Shared, arm: Arm, label: str, seed: int, runner: Runner) -> dict[str, Any]:
    """Train one arm with one seed and measure it; returns its win rates."""
    record = run_arm(shared, arm, seed, stage_progress, runner)
    rates = {name: rate["rate"] for name, rate in record.win_rate.items()}
    shown = "; ".join(f"{name} {percent(rate)}" for name, rate in rates.items())
    get_run_logger().info("%s, %s world, seed %d: win rate by %s", label, arm.world, seed, shown)
    return {"arm": label, "world": arm.world, "seed": seed, **rates}


@stage_task("ablation page")
def publish_ablation(shared: Shared, rows: list[dict[str, Any]], runner: Runner) -> dict[str, Any]:
    """`result.json`, `tables.md`, plots and `index.html` in `ablations/<id>/`; returns what result.json holds."""
    ablation = shared.ablation
    result = conclude(shared, stage_progress, runner)
    show_table("ablation-arms", rows, "Win rate of every arm and training")
    show_text("ablation-tables", ablation.run.store.read_bytes(ablation.key("tables.md")).decode(),
              "The paper's tables with this run's numbers beside")
    for name in result["plots"][:SHOWN_PLOTS]:
        data = ablation.run.store.read_bytes(ablation.key(f"plots/{name}.png"))
        show_image(f"ablation-{name}", Image.open(io.BytesIO(data)), name)
    get_run_logger().info("Ablation: %s", result["artifacts"]["page"])
    return result
