"""How the processes of one training agree and share gradients. With one process nothing is sent."""

import logging
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import distributed

LAUNCHED = "HGDPO_LAUNCHED"  # set by us alone, for the processes that we start as several
LEFT_BEHIND = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE",
               "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")
FAMILIES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "PMI_", "OMPI_COMM_", "MV2_COMM_")
DIVIDES_GRADIENTS = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
WAIT = timedelta(hours=12)
"""How long a process waits for another: the first alone reads and writes checkpoints of many GB and draws validation
images, longer than the 10 minutes of NCCL. When one dies, the launcher ends the others at once."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


def is_launcher_variable(name: str) -> bool:
    """Whether a variable is one by which launchers (torchrun, accelerate, MPI) distinguish processes."""
    return name in LEFT_BEHIND or name.startswith(FAMILIES)


def forget_launchers() -> None:
    """Remove what other launchers left in the environment: accelerate would believe it, and wait, or train otherwise.

    The processes that we started as several keep what was set for them, but for what would divide their gradients.
    """
    left = [name for name in os.environ if is_launcher_variable(name)]
    if LAUNCHED in os.environ:
        left = [name for name in left if name == DIVIDES_GRADIENTS]
    for name in left:
        del os.environ[name]
    if left and LAUNCHED not in os.environ:
        logger.warning("ignored, since this training was not started by them: the variables %s",
                       ", ".join(sorted(left)))


def launch_environment() -> dict[str, str]:
    """This process's environment for a launcher that we start, without what others left."""
    return {name: value for name, value in os.environ.items() if not is_launcher_variable(name)}


def count_processes() -> int:
    """How many processes train together, as far as we started them; known before accelerate starts."""
    return int(os.environ.get("WORLD_SIZE", "1")) if LAUNCHED in os.environ else 1


def is_first_process() -> bool:
    """Whether this is the process of a training that writes and reports; known before accelerate starts."""
    return LAUNCHED not in os.environ or os.environ.get("RANK", "0") == "0"


def part_of(batch: range, processes: int, index: int) -> range:
    """The part of a batch's positions that process `index` takes: consecutive, and none is two larger than another.

    Empty for some where there are more processes than positions.
    """
    first, last = (len(batch) * i // processes for i in (index, index + 1))
    return batch[first:last]


def agree(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in any process: they act together, or the others would wait for ever."""
    if accelerator.num_processes == 1:
        return flag
    votes: Any = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum")
    return votes.item() > 0


def from_first(accelerator: Accelerator, value: T) -> T:
    """The first process's value, small and picklable, in all of them."""
    sent = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(sent)
    return sent[0]


def sum_gradients(accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every process the sum of all processes' gradients, in place."""
    if accelerator.num_processes == 1:
        return
    sent: list[Any] = [distributed.all_reduce(parameter.grad, async_op=True)
                       for parameter in parameters if parameter.grad is not None]
    for work in sent:
        work.wait()
