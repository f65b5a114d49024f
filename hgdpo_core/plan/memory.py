"""What the stages of a run take of a GPU's memory, and the batches that fit; an estimate, for which nothing is loaded.

Networks, gradients, optimizer and LoRA follow from the numbers of weights in the model's files. Activations are those
of the family's architecture, counted on tensors without numbers (`benchmarks/memory.py`): in bf16 (float32 where a
stage computes in it), with fused attention, norms as CUDA's autocast computes them. They grow with pixels and batch.
Not counted: the CUDA context, workspaces of libraries, fragmentation, temporaries of an optimizer's step; a tenth of
each card is left for them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hgdpo_core.config import RunConfig, SftConfig, TrainingConfig
from hgdpo_core.models import Model
from hgdpo_core.models.backbone import family_name
from hgdpo_core.models.sizes import FLOAT_BYTES, ModelSize, model_size
from hgdpo_core.stages.probes import ENCODE_BATCH
from hgdpo_core.training.objective import find_objective

GIB = 2**30
CARDS = (24, 40, 80)  # GiB
USED = 0.9            # of a card
HALF_BYTES = 2
ADAM, ADAM_8BIT = 2 * FLOAT_BYTES, 2  # bytes of both moments per trained number


class PixelBytes(NamedTuple):
    """Bytes of activations per pixel of an image, or of each image of a pair."""

    sampling: int
    """With guidance, which is two passes."""
    decoding: int
    decoding_exact: int
    """In float32."""
    encoding: int
    """In float32."""
    tuning: int
    """Forwards and backwards: SFT."""
    preferring: int
    """Forwards and backwards: DPO."""
    checkpointed: int
    """Of either with gradient checkpointing, the larger count."""


class Architecture(NamedTuple):
    """A family's own: a model of another size is not estimated."""

    denoiser: int
    """Numbers of its weights."""
    bytes: PixelBytes


ARCHITECTURES = {
    "sd15": Architecture(859_520_964, PixelBytes(521, 1536, 3072, 2572, 4793, 4242, 1024)),
    "sdxl": Architecture(2_567_463_684, PixelBytes(316, 1536, 3072, 2572, 8325, 6995, 689)),
}


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a GPU: `fixed`, and `each` of what a batch of `batch` consists of."""

    stage: str
    unit: str
    batch: int
    fixed: float
    each: float

    def bytes(self, batch: int) -> float:
        return self.fixed + batch * self.each

    def largest(self, card: int) -> int:
        """The largest batch on a card of so many GiB; 0 where not even the networks fit."""
        return max(0, int((USED * card * GIB - self.fixed) / self.each))

    def describe(self) -> str:
        """One line: what the batch of the settings takes, and what fits."""
        fits = ", ".join(f"{self.largest(card) or 'none'} in {card} GB" for card in CARDS)
        return (f"memory of {self.stage}, estimated: {self.fixed / GIB:.1f} GiB and {self.each / GIB:.2f} for each "
                f"{self.unit}, {self.bytes(self.batch) / GIB:.1f} for a batch of {self.batch}; {self.unit}s at once: "
                f"{fits}")


def estimate_memory(config: RunConfig, target: Model) -> list[StageMemory]:
    """Of the stages of a run that need a GPU most; [] for a model of another architecture than its family's own."""
    family, size = family_name(target.path), model_size(target.path)
    architecture = ARCHITECTURES.get(family)
    if architecture is None or abs(size.denoiser / architecture.denoiser - 1) > 0.01:
        return []
    exact = target.dtype == "float16" and family == "sdxl" and target.vae is None
    return list(_stages(config, size, architecture.bytes, config.sampler.width * config.sampler.height, exact))


def _stages(config: RunConfig, size: ModelSize, of: PixelBytes, pixels: int, exact: bool) -> Iterator[StageMemory]:
    """`exact`: the VAE decodes in float32."""
    encoding = HALF_BYTES * (size.denoiser + size.text) + FLOAT_BYTES * size.codec  # the whole model is loaded

    if config.images is not None:
        yield StageMemory("latents of SFT", "image", ENCODE_BATCH, encoding, pixels * of.encoding)
        each = of.checkpointed if config.sft.gradient_checkpointing else of.tuning
        yield StageMemory("SFT", "image", config.sft.batch_size, _sft_bytes(config.sft, size), pixels * each)
    if config.pairs is None and find_objective(config.objective).trains_on == "triplets":
        each = max(of.sampling, of.decoding_exact if exact else of.decoding)
        yield StageMemory("sampling", "image", config.pool.batch_size, HALF_BYTES * size.whole, pixels * each)
    if config.objective == "dpo":
        yield StageMemory("latents of DPO", "image", ENCODE_BATCH, encoding, pixels * of.encoding)
        lora = config.dpo.lora_rank * size.attention * (2 * FLOAT_BYTES + _moments(config.dpo))
        each = of.checkpointed if config.dpo.gradient_checkpointing else of.preferring
        yield StageMemory("DPO", "pair", config.dpo.batch_size, HALF_BYTES * size.denoiser + lora, 2 * pixels * each)


def _sft_bytes(config: SftConfig, size: ModelSize) -> int:
    """Weights, gradients, both moments, and the moving average if there is one.

    Autocast's copies in half precision are gone when the last gradients come.
    """
    average = FLOAT_BYTES if config.ema_decay is not None else 0
    return size.denoiser * (2 * FLOAT_BYTES + _moments(config) + average)


def _moments(config: TrainingConfig) -> int:
    return ADAM_8BIT if config.optimizer == "adam8bit" else ADAM
