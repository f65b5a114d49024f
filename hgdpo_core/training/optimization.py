"""The optimizer and the learning rate of all objectives."""

import logging
from collections.abc import Iterable

import torch
from torch.optim.lr_scheduler import LambdaLR

from hgdpo_core.config import TrainingConfig

logger = logging.getLogger(__name__)


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that `config.optimizer` names, with decoupled weight decay in either case.

    "adam8bit" is bitsandbytes' 8-bit Adam (paper D.2), which keeps the states of tensors under 4096 elements
    in 32 bit; where bitsandbytes cannot be imported, torch's AdamW is used instead, with a warning.
    """
    parameters = list(parameters)
    rate, betas, decay = config.learning_rate, config.adam_betas, config.weight_decay
    if config.optimizer == "adam8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            logger.warning("optimizer adam8bit needs bitsandbytes, which cannot be imported (%s): using "
                           "torch's AdamW, whose states take 6 bytes more for each trained weight", error)
        else:
            return AdamW8bit(parameters, lr=rate, betas=betas, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay)


def warm_up_schedule(optimizer: torch.optim.Optimizer, warmup_steps: int) -> LambdaLR:
    """Constant learning rate after a linear warm-up: step s (from 1) runs at min(1, s / warmup_steps) of it.

    Unlike diffusers' `constant_with_warmup`, the first step does not run at zero and is not wasted.
    """
    return LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / max(1, warmup_steps)))
