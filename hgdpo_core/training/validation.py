"""Validation images of a model in training: the same prompts and seeds every so many steps, kept beside the model.

    models/<model_id>/validation/step-000500/0.png ...  images.json (written last)
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import numpy as np
import torch
from PIL import Image

from hgdpo_core.config import PromptSyntax, RunConfig, SamplerConfig, TrainingConfig
from hgdpo_core.config.base import StageConfig
from hgdpo_core.devices import free_memory, is_out_of_memory
from hgdpo_core.errors import ModelError
from hgdpo_core.images import decode_image, encode_image
from hgdpo_core.models import Backbone
from hgdpo_core.models.lora import lora_weight_set
from hgdpo_core.models.sampling import initial_noise, sample_latents
from hgdpo_core.prompts import image_seed
from hgdpo_core.rendering.grids import row_grid
from hgdpo_core.storage import Store
from hgdpo_core.training.parts import resolve_precision

logger = logging.getLogger(__name__)

SHOWN_STEPS = 8


class Validation(StageConfig):
    """What to generate. Seeds are the evaluation's, so its images of the same prompts begin from the same noise."""

    prompts: tuple[str, ...]
    prompt_syntax: PromptSyntax
    sampler: SamplerConfig
    seed: int
    lora_weight: float

    @classmethod
    def of_run(cls, config: RunConfig, training: TrainingConfig, prompts: Sequence[str]) -> Self | None:
        """Some evaluation prompts, evenly spread over their list; None where none are requested."""
        if training.validation_every is None or not prompts:
            return None
        count = min(training.validation_images, len(prompts))
        evaluation = config.evaluation
        return cls(prompts=tuple(prompts[i * len(prompts) // count] for i in range(count)),
                   prompt_syntax=evaluation.prompt_syntax, sampler=config.sampler.plain, seed=evaluation.seed,
                   lora_weight=evaluation.lora_weight)


class ValidationGenerator:
    """Samples with the backbone whose denoiser is in training; called with the number of steps done.

    Steps whose images exist are skipped. Too little memory for an image beside the training is a warning.
    """

    def __init__(self, store: Store, model_id: str, backbone: Backbone, validation: Validation, config: TrainingConfig):
        self._store, self._key = store, f"models/{model_id}/validation"
        self._backbone, self._validation = backbone, validation
        self._precision = resolve_precision(config.mixed_precision)
        self._solver = backbone.schedule.solver()
        text = backbone.text.reading(validation.prompt_syntax)
        self._prompts = [prompt.to("cpu", torch.float32) for prompt in text.encode(validation.prompts)]
        self._negatives = [text.negative(prompt.length).to("cpu", torch.float32) for prompt in self._prompts]

    def __call__(self, step: int) -> None:
        folder = f"{self._key}/step-{step:06d}"
        if self._store.exists(f"{folder}/images.json"):
            return
        try:
            with self._as_sampled():
                images = [self._generate(number) for number in range(len(self._prompts))]
        except ModelError as error:
            logger.warning("no validation images of step %d: %s. Training goes on", step, error)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            images = None
        if images is None:  # not in the handler: the error holds on to the tensors it met
            free_memory()
            logger.warning("no validation images of step %d: memory ran out. Training goes on", step)
            return
        for number, pixels in enumerate(images):
            self._store.write_bytes(f"{folder}/{number}.png", encode_image(pixels, "png"))
        self._store.write_json(f"{folder}/images.json", {"step": step, **self._validation.model_dump(mode="json")})

    def _generate(self, number: int) -> np.ndarray:
        backbone, sampler = self._backbone, self._validation.sampler
        device = backbone.denoiser.device
        noise = initial_noise([image_seed(self._validation.seed, self._validation.prompts[number], 0)],
                              *backbone.latent_shape((sampler.width, sampler.height)))
        latents = sample_latents(backbone.denoiser, self._solver, self._prompts[number].to(device),
                                 self._negatives[number].to(device), noise, steps=sampler.steps,
                                 guidance_scale=sampler.guidance_scale)
        backbone.codec.to(device)
        try:
            return backbone.codec.decode(latents).pixels[0]
        finally:
            backbone.codec.to("cpu")  # where it waits: training needs the room

    @contextmanager
    def _as_sampled(self) -> Iterator[None]:
        """The denoiser as the evaluation will use it: LoRA at its weight, no dropout, the precision of training."""
        denoiser = self._backbone.denoiser
        training, dtype = denoiser.training, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._precision)
        denoiser.eval()
        try:
            with lora_weight_set(denoiser.network, self._validation.lora_weight), \
                    torch.autocast(denoiser.device.type, dtype=dtype, enabled=dtype is not None):
                yield
        finally:
            denoiser.train(training)


def validation_steps(store: Store, model_id: str) -> list[int]:
    """The steps that have images, ascending."""
    keys = (key.split("/") for key, _, _ in store.walk(f"models/{model_id}/validation"))  # one LIST
    return sorted(int(key[-2].removeprefix("step-")) for key in keys if key[-1] == "images.json")


def validation_grid(store: Store, model_id: str) -> Image.Image | None:
    """A row of images per step, the first step and the latest ones; None while there are no images."""
    steps = validation_steps(store, model_id)
    if not steps:
        return None
    rows, prompts = [], []
    for step in [steps[0], *steps[1:][1 - SHOWN_STEPS:]]:
        folder = f"models/{model_id}/validation/step-{step:06d}"
        prompts = store.read_object(f"{folder}/images.json", prompts=list[str])["prompts"]
        rows.append((f"step {step}", [decode_image(store.read_bytes(f"{folder}/{number}.png"))
                                      for number in range(len(prompts))]))
    return row_grid(" | ".join(prompts), rows)
