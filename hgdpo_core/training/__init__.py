"""What SFT and DPO have in common; their own halves are `sft.py` and `train.py` beside this folder.

`request.py` is a training as data, `tuning.py` carries it out from latents to a kept model, `launch.py` on many GPUs.
`loop.py` is the loop; `parts.py` what goes into it: samples, draws, objectives, precision. `micro_batches.py` fits
steps into memory, `processes.py` joins them, `optimization.py` and `checkpoints.py` say so themselves. On the way:
`validation.py` draws pictures, `trackers.py` curves, `averaging.py` keeps mean weights.
"""

from hgdpo_core.training.parts import (
    Generators,
    Hooks,
    Objective,
    OnLog,
    SampleSource,
    TrainingResult,
    Validate,
    cast_frozen,
    draw_flips,
    draw_noise,
    draw_timesteps,
    epoch_order,
    resolve_precision,
    sample_generator,
    turn,
)

__all__ = ["Generators", "Hooks", "Objective", "OnLog", "SampleSource", "TrainingResult", "Validate", "cast_frozen",
           "draw_flips", "draw_noise", "draw_timesteps", "epoch_order", "resolve_precision", "sample_generator", "turn"]
