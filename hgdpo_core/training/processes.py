"""What the processes of one training tell each other. With one process nothing is sent."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import distributed


def is_first_process() -> bool:
    """Whether this is the process of a training that writes and reports; known before accelerate is there."""
    return os.environ.get("RANK", "0") == "0"


def share_of(batch: range, processes: int, index: int) -> range:
    """The part of a batch's positions that process `index` takes: consecutive, and none is two larger than another.

    Empty for some where there are more processes than positions.
    """
    first, last = (len(batch) * i // processes for i in (index, index + 1))
    return batch[first:last]


def agree(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process says so: they act together, or the others would wait for ever."""
    if accelerator.num_processes == 1:
        return flag
    votes: Any = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum")
    return votes.item() > 0


def first_says(accelerator: Accelerator, number: int) -> int:
    """The first process's number, in all of them."""
    if accelerator.num_processes == 1:
        return number
    said: Any = broadcast(torch.tensor(number, device=accelerator.device))
    return int(said.item())


def sum_gradients(accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every process the sum of all processes' gradients, in place."""
    if accelerator.num_processes == 1:
        return
    sent: list[Any] = [distributed.all_reduce(parameter.grad, async_op=True)
                       for parameter in parameters if parameter.grad is not None]
    for work in sent:
        work.wait()
