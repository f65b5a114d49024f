"""One training loop for all networks: warm-up and cosine, gradient clipping, moving average, resume.

Step `k` draws its randomness from `[seed, k]` alone, so a resumed run gets the batches of an uninterrupted one.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from hgdpo_core.devices import cpu_has_fast_bfloat16

LossOf = Callable[[np.random.Generator, torch.Generator], Tensor]
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Plan:
    """How long and how fast one network trains."""

    steps: int
    batch: int
    learning_rate: float
    warm_up: int = 200
    average: float = 0.998  # decay of the moving average of the weights
    weight_decay: float = 0.01
    checkpoint_seconds: float = 60.0


def rate_at(step: int, plan: Plan) -> float:
    """The learning rate of a step: linear warm-up, then a cosine to a fiftieth."""
    warm_up = min(plan.warm_up, max(plan.steps // 10, 1))
    if step < warm_up:
        return plan.learning_rate * (step + 1) / warm_up
    progress = (step - warm_up) / max(plan.steps - warm_up, 1)
    return plan.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def randomness(seed: int, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """The two random generators of one step."""
    rng = np.random.default_rng([seed, step])
    return rng, torch.Generator().manual_seed(int(rng.integers(2**62)))


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * module, buffers copied."""
    for mine, theirs in zip(average.parameters(), module.parameters(), strict=True):
        mine.lerp_(theirs, 1 - decay)
    for mine, theirs in zip(average.buffers(), module.buffers(), strict=True):
        mine.copy_(theirs)


def train(module: Network, loss_of: LossOf, plan: Plan, *, name: str, seed: int, checkpoint: Path) -> Network:
    """Train `module` on `loss_of(rng, generator)` and return its moving average, in eval mode.

    `checkpoint` is written every minute and at the end; if it exists, training resumes from it.
    """
    average = copy.deepcopy(module).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(module.parameters(), lr=plan.learning_rate, betas=(0.9, 0.99),
                                  weight_decay=plan.weight_decay, fused=True)
    parts = {"module": module, "average": average, "optimizer": optimizer}
    start, seconds = load_checkpoint(checkpoint, parts)
    saved = time.monotonic()
    bar = tqdm(range(start, plan.steps), initial=start, total=plan.steps, desc=name, mininterval=2)
    module.train()
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, plan)
        with fast_autocast():
            loss = loss_of(*randomness(seed, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        update_average(average, module, min(plan.average, (1 + step) / (10 + step)))
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.4f}", refresh=False)
        if time.monotonic() - saved > plan.checkpoint_seconds or step + 1 == plan.steps:
            seconds += time.monotonic() - saved
            saved = time.monotonic()
            save_checkpoint(checkpoint, parts, step + 1, seconds)
    return average


def fast_autocast() -> torch.autocast:
    """bfloat16 on a CPU that multiplies it in hardware; where it is emulated, float32 is several times faster."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=cpu_has_fast_bfloat16())


def save_checkpoint(path: Path, parts: dict, step: int, seconds: float) -> None:
    state = {key: part.state_dict() for key, part in parts.items()}
    temporary = path.with_suffix(".tmp")
    torch.save({"step": step, "seconds": seconds, **state}, temporary)
    temporary.replace(path)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that is either complete or absent."""
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


def open_in_float32(folder: Path) -> None:
    """Let a saved fp16 transformers model open in float32, as diffusers models do.

    transformers opens a model in the dtype of its configuration, which is the one it was saved in; a pipeline would
    then mix an fp16 text encoder with a float32 UNet, and fail.
    """
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def load_checkpoint(path: Path, parts: dict) -> tuple[int, float]:
    """Fill the parts from a checkpoint; returns the next step and the seconds spent so far, or zeros without one."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True, map_location="cpu")
    for key, part in parts.items():
        part.load_state_dict(state[key])
    return state["step"], state["seconds"]


def read_progress(path: Path) -> dict[str, float]:
    """The seconds of training that a checkpoint records; empty for a stage that keeps none."""
    if not path.exists():
        return {}
    return {"seconds": round(torch.load(path, weights_only=True, map_location="cpu", mmap=True)["seconds"], 1)}


def in_batches(total: int, size: int, name: str) -> Iterator[slice]:
    """Slices that cover `total` items, under a progress bar."""
    with tqdm(total=total, desc=name, mininterval=2) as bar:
        for first in range(0, total, size):
            last = min(first + size, total)
            yield slice(first, last)
            bar.update(last - first)
