"""A DPO step side by side: ours against diffusers' public Diffusion-DPO LoRA example for Stable Diffusion.

    python -m benchmarks.dpo_step                                  # the figures target on the CPU
    python -m benchmarks.dpo_step --clock cpu --threads 1          # on a machine that others use too
    python -m benchmarks.dpo_step --size sd15 --device cuda --batch 4
    python -m benchmarks.dpo_step --size tiny --dtype float32      # seconds, to see that the pipeline of sd15 runs

The example (examples/research_projects/diffusion_dpo/train_diffusion_dpo.py) decodes its images, encodes them and their
captions in every step, in the process that trains. It is written out here in its own order with its own defaults; only
its square resize is rectangular, and so that losses can be compared it takes the mean of the VAE's posterior instead of
a sample, draws noise and timesteps as our trainer does, and flips nothing. Ours is `run_training` on latents in shards.
Same weights, LoRA, pairs, batch, precision and optimizer.

Whether both compute the same losses is asked in float32 first, over three steps of one pair, and the script fails where
they differ by more than a thousandth. In half precision the example also encodes its images so, and losses wander.
"""

import argparse
import io
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from PIL import Image

from benchmarks.score import make_images
from benchmarks.targets import add_device_options, clock_of, describe, open_target, some_prompts
from hgdpo_core.config import DpoConfig
from hgdpo_core.images import encode_image, to_model_range
from hgdpo_core.models import Model, load_backbone, load_pipeline
from hgdpo_core.models.ddpm import DdpmSchedule, draw_timesteps
from hgdpo_core.models.lora import add_lora
from hgdpo_core.models.sd15 import UnetDenoiser
from hgdpo_core.stages.latents import SCHEMA
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.base import Hooks
from hgdpo_core.training.data import LatentPairs, sample_generator
from hgdpo_core.training.dpo import prepare_dpo
from hgdpo_core.training.loop import run_training
from hgdpo_core.training.optimization import make_optimizer, warm_up_schedule
from hgdpo_core.training.parts import draw_noise

PRECISIONS: dict[str, Any] = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
TOLERANCE = 1e-3
"""Relative, of a step's loss in float32."""
CHECKED_STEPS = 3
WARM_UP_STEPS = 2


@dataclass
class Row:
    """One line of the table: what a step took, after the first ones; and the losses of all."""

    what: str
    seconds: float
    losses: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Pairs:
    """Triplets as both sides read them: encoded images with captions, and their latents."""

    winners: list[bytes]
    losers: list[bytes]
    captions: list[str]
    latents: LatentPairs


def make_pairs(model: Model, size: tuple[int, int], count: int, folder: Path) -> Pairs:
    """`count` pairs of soft images; their latents and text embeddings in one shard, as the product caches them."""
    images = make_images(2 * count, *size)
    captions = some_prompts(count)
    backbone = load_backbone(model, codec_dtype="float32")
    latents = [row.numpy().tobytes() for image in images
               for row in backbone.codec.encode(torch.from_numpy(to_model_range(image))[None])]
    embeds = [row.float().numpy().tobytes() for row in backbone.text.encode_captions(captions).embeds]
    table = pa.table({"prompt_id": captions, "winner": latents[:count], "loser": latents[count:],
                      "prompt_embeds": embeds}, schema=SCHEMA)
    shards = ShardFolder.create(Store(str(folder)), "latents/benchmark", {"stage": "latents"})
    shards.commit(0, table, details=backbone.shapes(size))
    files = [encode_image(np.asarray(image), "png") for image in images]
    return Pairs(files[:count], files[count:], captions, LatentPairs(shards, [0]))


# -- the example


class Example:
    """The public example's loop, one step at a time."""

    def __init__(self, model: Model, pairs: Pairs, config: DpoConfig, options: argparse.Namespace):
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(mixed_precision=PRECISIONS[model.dtype],
                                       cpu=not options.device.startswith("cuda"))
        self.pairs, self.config, self.step_number = pairs, config, 0
        pipeline = load_pipeline(model, self.accelerator.device.type)
        self.vae, self.text_encoder, self.tokenizer = pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
        add_lora(pipeline.unet, config.lora_rank, config.seed)
        if config.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        schedule = pipeline.scheduler.config
        self.scheduler: Any = DDPMScheduler.from_config(schedule, clip_sample=False, thresholding=False)
        self.parameters = [p for p in pipeline.unet.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.parameters, config)
        self.lr_schedule = warm_up_schedule(optimizer, config.warmup_steps)
        self.unet: Any = None
        self.unet, self.optimizer = self.accelerator.prepare(pipeline.unet, optimizer)
        self.unet.train()

    def step(self) -> float:
        """One optimizer step; its loss."""
        first = self.step_number * self.config.batch_size
        positions = range(first, first + self.config.batch_size)
        loss = self._loss([self._row(position) for position in positions],
                          [sample_generator(self.config.seed, position) for position in positions])
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.lr_schedule.step()
        self.optimizer.zero_grad()
        self.step_number += 1
        return loss.detach().item()

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, len(self.pairs.latents))
        return self.pairs.latents.order(self.config.seed, epoch)[index]

    def _loss(self, rows: Sequence[int], generators: list[torch.Generator]) -> torch.Tensor:
        pixels = [_read_image(files[row]) for files in (self.pairs.winners, self.pairs.losers) for row in rows]
        feed = torch.stack(pixels).to(self.accelerator.device, self.vae.dtype)
        with torch.no_grad():  # frozen, so the example's own graph ends here too
            latents = self.vae.encode(feed).latent_dist.mode() * self.vae.config.scaling_factor
            ids = self.tokenizer([self.pairs.captions[row] for row in rows], truncation=True, padding="max_length",
                                 max_length=self.tokenizer.model_max_length, return_tensors="pt").input_ids
            embeds = self.text_encoder(ids.to(self.accelerator.device))[0].repeat(2, 1, 1)
        timesteps = draw_timesteps(generators, len(self.scheduler)).to(latents.device).repeat(2)
        noise = draw_noise(generators, latents[:len(rows)]).to(latents.dtype).repeat(2, 1, 1, 1)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        winner, loser = self._errors(noisy, timesteps, embeds, target).chunk(2)
        network = self.accelerator.unwrap_model(self.unet)
        network.disable_adapters()
        with torch.no_grad():
            reference_winner, reference_loser = self._errors(noisy, timesteps, embeds, target).chunk(2)
        network.enable_adapters()
        logits = (reference_winner - reference_loser) - (winner - loser)
        return -F.logsigmoid(self.config.beta * logits).mean()

    def _errors(self, noisy: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor,
                target: torch.Tensor) -> torch.Tensor:
        prediction = self.unet(noisy, timesteps, embeds).sample
        return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def _read_image(data: bytes) -> torch.Tensor:
    """What the example's transforms make of an image of the right size."""
    return torch.from_numpy(to_model_range(Image.open(io.BytesIO(data)).convert("RGB")))


# -- measuring


def run_example(model: Model, pairs: Pairs, config: DpoConfig, options: argparse.Namespace,
                now: Callable[[], float]) -> Row:
    """The example, `config.max_steps` of it."""
    example, marks, losses = Example(model, pairs, config, options), [], []
    _forget_peak(options)
    for _ in range(config.max_steps or 0):
        losses.append(example.step())
        marks.append(now())
    return Row(_named("public example", config), _step_seconds(marks), losses, _peak(options))


def run_ours(model: Model, pairs: Pairs, config: DpoConfig, options: argparse.Namespace,
             now: Callable[[], float]) -> Row:
    """Our trainer with the same settings."""
    pipeline, marks = load_pipeline(model), []
    schedule, denoiser = DdpmSchedule(pipeline.scheduler.config), UnetDenoiser(pipeline.unet.float())
    del pipeline
    _forget_peak(options)
    result = run_training(prepare_dpo(denoiser, schedule, config), pairs.latents, config, None,
                          Hooks(on_log=lambda _: marks.append(now())))
    name = "ours with SML" if config.lambda_stat else "ours without SML"
    return Row(_named(name, config), _step_seconds(marks), [row["dpo_loss"] for row in result.log], _peak(options))


def _named(what: str, config: DpoConfig) -> str:
    return ", ".join([what, *["pure bf16"] * (not config.autocast),
                      *["gradient checkpointing"] * config.gradient_checkpointing])


def _step_seconds(marks: Sequence[float]) -> float:
    return statistics.median(np.diff(marks[WARM_UP_STEPS - 1:]).tolist())


def _forget_peak(options: argparse.Namespace) -> None:
    if options.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(options: argparse.Namespace) -> int | None:
    return torch.cuda.max_memory_allocated() if options.device.startswith("cuda") else None


def largest_difference(row: Row, first: Row) -> float:
    """Of two rows' losses, relative."""
    return max(abs(a - b) / abs(b) for a, b in zip(row.losses, first.losses, strict=True))


def format_table(rows: Sequence[Row]) -> str:
    """A Markdown table; the first row is what the others are compared with."""
    first = rows[0]
    lines = ["| side | seconds a step | ratio | peak memory | of the example's | largest difference of a loss |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        memory = ["-", "-"]
        if row.peak_bytes and first.peak_bytes:
            memory = [f"{row.peak_bytes / 2**30:.2f} GiB", f"{row.peak_bytes / first.peak_bytes:.2f}x"]
        lines.append(f"| {row.what} | {row.seconds:.4g} | {first.seconds / row.seconds:.2f}x | {' | '.join(memory)} | "
                     f"{largest_difference(row, first):.2g} |")
    return "\n".join(lines)


def check_losses(model: Model, size: tuple[int, int], config: DpoConfig, options: argparse.Namespace, folder: Path,
                 now: Callable[[], float]) -> float:
    """Largest relative difference of a loss between both sides, in float32 and with little memory."""
    model = replace(model, dtype="float32")
    pairs = make_pairs(model, size, 2, folder / "float32")
    config = config.model_copy(update={"max_steps": CHECKED_STEPS, "batch_size": 1, "mixed_precision": "no",
                                       "gradient_checkpointing": True})
    return largest_difference(run_ours(model, pairs, config, options, now),
                              run_example(model, pairs, config, options, now))


def compare(options: argparse.Namespace, folder: Path) -> tuple[float, list[Row]]:
    """What `check_losses` finds; the example, ours without and with SML, in bf16 also with SML and no autocast, and
    with SML and gradient checkpointing.
    """
    now = clock_of(options)
    os.environ["HGDPO_DEVICE"] = "cuda" if options.device.startswith("cuda") else "cpu"
    model, preset = open_target(options.size, folder, options.dtype)
    batch = options.batch or preset.dpo.batch_size
    config = preset.dpo.model_copy(update={
        "max_steps": options.steps + WARM_UP_STEPS, "batch_size": batch, "lambda_stat": 0.0,
        "mixed_precision": PRECISIONS[options.dtype]})
    size = (preset.sampler.width, preset.sampler.height)
    difference = check_losses(model, size, config, options, folder, now)
    pairs = make_pairs(model, size, 2 * batch, folder)
    with_sml = config.model_copy(update={"lambda_stat": preset.dpo.lambda_stat})
    pure = [with_sml.model_copy(update={"autocast": False})] if options.dtype == "bfloat16" else []
    checkpointed = with_sml.model_copy(update={"gradient_checkpointing": True})
    rows = [run_example(model, pairs, config, options, now)]
    # Turn by turn, for the machine's mood changes more than SML costs.
    turns = [[run_ours(model, pairs, settings, options, now) for settings in (config, with_sml, *pure)]
             for _ in range(options.turns)]
    rows += [min(side, key=lambda row: row.seconds) for side in zip(*turns, strict=True)]
    return difference, [*rows, run_ours(model, pairs, checkpointed, options, now)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and report whether the losses agree."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_device_options(parser)
    parser.add_argument("--batch", type=int, help="pairs; default: the preset's")
    parser.add_argument("--steps", type=int, default=8, help="measured ones, after the first two")
    parser.add_argument("--turns", type=int, default=2, help="of ours; of each the fastest counts")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        difference, rows = compare(options, Path(name))
    print(f"{describe(options)}\n{options.steps} steps measured; SML costs {rows[2].seconds / rows[1].seconds:.3f}x; "
          f"in float32 the losses differ by {difference:.2g} (tolerance {TOLERANCE:g})\n\n{format_table(rows)}")
    if difference > TOLERANCE:
        print("error: the losses differ by more than the tolerance", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
