"""The optimizer and the learning rate of all objectives."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from hgdpo_core.config import TrainingConfig
from hgdpo_core.devices import is_out_of_memory

logger = logging.getLogger(__name__)


def make_optimizer(parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
                   config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that `config.optimizer` names, with decoupled weight decay in either case.

    "adam8bit" is bitsandbytes' 8-bit Adam (paper D.2), which keeps the states of tensors under 4096 elements
    in 32 bit; where bitsandbytes does not work, torch's AdamW is used instead, with a warning.
    """
    groups: list[Any] = list(parameters)
    first = groups[0]["params"][0] if isinstance(groups[0], dict) else groups[0]
    rate, betas, decay = config.learning_rate, config.adam_betas, config.weight_decay
    if config.optimizer == "adam8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
            _try_step(AdamW8bit, first.device)
        except Exception as error:  # of many kinds: it looks for its native library only in the first step
            if is_out_of_memory(error):
                raise
            logger.warning("optimizer adam8bit needs bitsandbytes, which does not work here (%s): using torch's AdamW, "
                           "whose states take 6 bytes more for each trained weight", str(error).partition("\n")[0])
        else:
            return AdamW8bit(groups, lr=rate, betas=betas, weight_decay=decay)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=decay)


def _try_step(optimizer: Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer], device: torch.device) -> None:
    """A step on weights of no use, as many as have 8-bit states."""
    weights = torch.nn.Parameter(torch.zeros(4096, device=device))
    weights.grad = torch.zeros_like(weights)
    optimizer([weights]).step()


def warm_up_schedule(optimizer: torch.optim.Optimizer, warmup_steps: int) -> LambdaLR:
    """Constant learning rate after a linear warm-up: step s (from 1) runs at min(1, s / warmup_steps) of it.

    Unlike diffusers' `constant_with_warmup`, the first step does not run at zero and is not wasted.
    """
    return LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / max(1, warmup_steps)))
