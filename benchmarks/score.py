"""Scoring side by side: our batched PickScore against the snippet of its model card, one image at a time.

    python benchmarks/score.py                        # ViT-H/14 with random weights on the CPU: 4 GB, minutes
    python benchmarks/score.py --device cuda --images 200 --batch 64
    python benchmarks/score.py --size tiny            # seconds, to see that it runs
    python benchmarks/score.py --source folder        # real weights: a folder or hub id, as for the scorer

Both sides get the same weights, images and prompts; the table's errors are against the snippet in float32. On a
machine that others use too, `--clock cpu --threads 1` counts this process's own processor seconds; either way only
the ratios carry over to another machine.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from hgdpo_core.devices import DTYPES
from hgdpo_core.models.hub import quiet_transformers
from hgdpo_core.scorers import pickscore
from hgdpo_core.scorers.weights import freeze

SIZES: dict[str, dict[str, Any]] = {
    "full": {"projection_dim": 1024,
             "text": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                      "num_attention_heads": 16},
             "vision": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                        "num_attention_heads": 16, "image_size": 224, "patch_size": 14}},
    "tiny": {"projection_dim": 32,
             "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
             "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                        "num_attention_heads": 4, "image_size": 56, "patch_size": 14}},
}
PROMPTS = ["a woman in a red coat walks a small dog along the river at dusk",
           "portrait of an old fisherman mending his nets in the harbour",
           "two children run through a field of tall grass under a stormy sky",
           "a young man plays the violin on the steps of a theatre"]


@dataclass
class Parts:
    """The parts that both sides use."""

    model: Any
    tokenizer: CLIPTokenizer
    processor: CLIPImageProcessorPil


@dataclass
class Row:
    """One line of the table."""

    what: str
    dtype: str
    batch: int
    seconds_per_image: float
    scores: torch.Tensor


def random_scorer(size: str) -> Parts:
    """A scorer in the shape of PickScore with random weights and a small tokenizer in which every word is a token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(PROMPTS, trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    state = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(merge) for merge in state["merges"]]  # transformers' own type is wrong
    tokenizer = CLIPTokenizer(vocab=state["vocab"], merges=merges)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}
    shape = SIZES[size]
    config = CLIPConfig(text_config={**shape["text"], "vocab_size": 49408, "hidden_act": "gelu", **ids},
                        vision_config={**shape["vision"], "hidden_act": "gelu"},
                        projection_dim=shape["projection_dim"], logit_scale_init_value=4.6052)
    side = shape["vision"]["image_size"]
    torch.manual_seed(0)
    with quiet_transformers():
        model = CLIPModel(config)
    return Parts(model, tokenizer, CLIPImageProcessorPil(size={"shortest_edge": side},
                                                         crop_size={"height": side, "width": side}))


def make_images(count: int, width: int, height: int) -> list[Image.Image]:
    """Soft colours with grain, all different."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(count):
        soft = Image.fromarray(random.integers(0, 256, (6, 4, 3), dtype=np.uint8)).resize((width, height), 3)
        grain = random.integers(-12, 13, (height, width, 3))
        images.append(Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8)))
    return images


@torch.no_grad()
def score_as_published(parts: Parts, image: Image.Image, prompt: str) -> float:
    """The model card's `calc_probs` for one image, up to its softmax, with transformers 5's names for the same."""
    device = parts.model.device
    image_inputs = parts.processor(images=[image], return_tensors="pt").to(device)
    limit = min(77, parts.model.config.text_config.max_position_embeddings)
    text_inputs = parts.tokenizer(prompt, padding=True, truncation=True, max_length=limit,
                                  return_tensors="pt").to(device)
    image_embs = parts.model.get_image_features(pixel_values=image_inputs["pixel_values"].to(parts.model.dtype))
    image_embs = image_embs.pooler_output / torch.norm(image_embs.pooler_output, dim=-1, keepdim=True)
    text_embs = parts.model.get_text_features(**text_inputs).pooler_output
    text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
    return float((parts.model.logit_scale.exp() * (text_embs @ image_embs.T)[0])[0])


def measure(run: Callable[[list[int]], list[float]], indices: Sequence[int], batch: int, clock: Callable[[], float],
            device: str) -> tuple[float, torch.Tensor]:
    """Median seconds an image over the batches of `indices`, and all scores; one batch is thrown away first."""
    run(list(indices[:batch]))
    seconds, scores = [], []
    for first in range(0, len(indices), batch):
        chosen = list(indices[first:first + batch])
        _wait_for(device)
        start = clock()
        scores += run(chosen)
        _wait_for(device)
        seconds.append((clock() - start) / len(chosen))
    return statistics.median(seconds), torch.tensor(scores)


def _wait_for(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def compare(options: argparse.Namespace) -> list[Row]:
    """The snippet and ours in each precision."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    parts = _real_scorer(options.source) if options.source else random_scorer(options.size)
    images = make_images(options.images, options.width, options.height)
    prompts = [PROMPTS[i // options.images_per_prompt % len(PROMPTS)] for i in range(options.images)]
    indices, rows = range(options.images), []
    for name in options.dtypes:
        parts.model = freeze(parts.model.to(DTYPES[name]), options.device)
        ours = pickscore.PickScore(parts.model, parts.tokenizer, parts.processor, "")
        for what, batch, run in (
                ("model card, one by one", 1,
                 lambda chosen: [score_as_published(parts, images[i], prompts[i]) for i in chosen]),
                ("ours", options.batch,
                 lambda chosen, ours=ours: ours.score([images[i] for i in chosen],
                                                      [prompts[i] for i in chosen]).tolist())):
            rows.append(Row(what, name, batch, *measure(run, indices, batch, clock, options.device)))
    return rows


def _real_scorer(source: str) -> Parts:
    folder, processor_folder, _ = pickscore.locate(source)
    return Parts(CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(processor_folder),
                 CLIPImageProcessorPil.from_pretrained(processor_folder))


def format_table(rows: Sequence[Row]) -> str:
    """A Markdown table; the first row is what the others are compared with."""
    first = rows[0]
    lines = ["| side | precision | batch | images/s | ratio | largest score error | spread of scores |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        error = (row.scores - first.scores).abs().max()
        lines.append(f"| {row.what} | {row.dtype} | {row.batch} | {1 / row.seconds_per_image:.3g} | "
                     f"{first.seconds_per_image / row.seconds_per_image:.2f}x | {error:.2g} | {row.scores.std():.2g} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="of the random scorer")
    parser.add_argument("--source", help="real PickScore weights, a folder or hub id, instead of random ones")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"],
                        help="the first is what the others are compared with")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--images-per-prompt", type=int, default=20)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--width", type=int, default=704)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = compare(options)
    print(f"{options.source or options.size + ', random weights'}, {options.images} images of {options.width}x"
          f"{options.height}, {options.images_per_prompt} per prompt, {options.device}, {torch.get_num_threads()} "
          f"threads, {options.clock} clock, torch {torch.__version__}\n\n{format_table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
