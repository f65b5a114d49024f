"""Training: SFT (`sft.py`), Diffusion-DPO with SML (`dpo.py`), by name in `objective.py`; and what they share.

`request.py` is a training as data, `tune.py` carries it out from latents to a kept model, `launch.py` on many GPUs.
`loop.py` is the loop; `data.py` its samples and their order, `parts.py` draws, what the loop trains, precision.
`micro_batches.py` fits steps into memory, `processes.py` joins them, `optimization.py` and `checkpoints.py` say so
themselves. On the way: `validation.py` draws pictures, `trackers.py` curves.
"""

from hgdpo_core.models.ddpm import draw_timesteps
from hgdpo_core.training.data import SampleSource, epoch_order, sample_generator
from hgdpo_core.training.parts import (
    Generators,
    Hooks,
    Objective,
    OnLog,
    TrainingResult,
    Validate,
    cast_frozen,
    draw_flips,
    draw_noise,
    resolve_precision,
    turn,
)

__all__ = ["Generators", "Hooks", "Objective", "OnLog", "SampleSource", "TrainingResult", "Validate", "cast_frozen",
           "draw_flips", "draw_noise", "draw_timesteps", "epoch_order", "resolve_precision", "sample_generator", "turn"]
