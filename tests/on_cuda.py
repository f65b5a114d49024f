"""What the tests on a pretended GPU share: sampling and training steps whose waits are counted."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from hgdpo_core.config import PoolConfig, SamplerConfig
from hgdpo_core.images import decode_image
from hgdpo_core.models.image_generator import ImageGenerator

PROMPTS = ["a woman in a red top", "a (man:1.4) in a blue top BREAK a beach"]
SAMPLER = SamplerConfig(width=32, height=32, steps=2, guidance_scale=4.0)
POOL = PoolConfig(images_per_prompt=2, prompts_per_shard=2, batch_size=2)


def drawn(model, device, log=None, sampler=SAMPLER, copies=12):
    """Pixels of two batches, of which the log is; with it, once more in another number of steps.

    `copies` to the GPU at most: noise, timesteps, both texts.
    """
    generator = ImageGenerator(model, sampler, POOL, device)
    pixels = []
    for steps in (sampler.steps, 1) if log is not None else (sampler.steps,):
        generator.sampler = sampler.model_copy(update={"steps": steps})
        if log is not None:
            log.clear()
        pixels.append(np.stack([np.asarray(decode_image(row["image"])) for row in generator.generate(PROMPTS)]))
        if log is not None:  # whatever the steps: whether latents are finite, and their pixels
            assert log.values.total() <= log.to_host.total() == 2, log
            assert log.to_device.total() <= copies, sorted(log.to_device.items())
    return pixels[0].astype(int)


@contextmanager
def on_cpu():
    """Inside, trainings run on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HGDPO_DEVICE", "cpu")
        yield


def check_steps(log, result, *, fp16):
    """The host waits for the row of the log; under fp16 accelerate's scaler asks too whether to skip the step."""
    log = replace(log, to_host=of_package(log.to_host), to_device=of_package(log.to_device))
    steps = len(result.log)
    assert log.values.total() == steps * (2 if fp16 else 1) and not log.to_host, log
    once = ("training/loop.py", "models/averaging.py")  # the networks
    inputs = Counter({place: n for place, n in log.to_device.items() if not any(name in place for name in once)})
    assert inputs.total() <= steps * 12, log
    assert not any("losses.py" in place for place in inputs), log  # those come when the predictions are queued


def of_package(places):
    return Counter({place: n for place, n in places.items() if place.startswith("hgdpo_core/")})
