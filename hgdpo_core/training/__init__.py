"""Training: SFT (`sft.py`), Diffusion-DPO with SML (`dpo.py`), by name in `objective.py`; and what they share.

`request.py` is a training as data, `tune.py` carries it out from latents to a kept model, `launch.py` on many GPUs.
`base.py` is what an objective is, `loop.py` the loop, `data.py` its samples and their order, `parts.py` noise, flips,
precision.
`micro_batches.py` fits steps into memory, `processes.py` joins processes, with `optimization.py` and `checkpoints.py`.
During training, `validation.py` generates images and `trackers.py` sends curves.
"""
