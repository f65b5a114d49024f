"""How good the trained networks are, on figures of the test split with seeds that no training image had."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from ..dataset import HELD_OUT_SEED, render_batch, sample_figures, to_model_range, to_pixels
from ..inspector import inspect, load_inspector
from ..people import VOCABULARIES, Figure, caption, parse_caption, prompts
from .generated_pairs import make_generated_pairs
from .judge import unit
from .judge_data import KINDS, Pairs, make_pairs
from .loop import in_batches
from .sampling import generate, load_pipeline
from .tokenizer import tokenize
from .vae import decode, encode, psnr

# How the target is sampled for its own evaluation; few steps, since 8 x 8 latents need few.
STEPS, GUIDANCE = 12, 3.0
GENERATED_KINDS = 6


def held_out(count: int) -> tuple[list[Figure], np.ndarray, np.ndarray]:
    """`count` figures of the test split, their correct images and masks."""
    figures = sample_figures("test", count, np.random.default_rng(HELD_OUT_SEED))
    return figures, *render_batch(figures, range(HELD_OUT_SEED, HELD_OUT_SEED + count))


def evaluate_vae(vae: AutoencoderKL, count: int) -> dict:
    """PSNR in dB of correct images through the VAE: over all pixels, and over those of the person."""
    _, rendered, masks = held_out(count)
    latents = encode(vae, rendered, name="vae: encode")
    decoded = torch.cat([decode(vae, latents[part]) for part in in_batches(count, 64, "vae: decode")])
    images, mask = to_model_range(rendered), torch.from_numpy(masks)[:, None].float() / 255
    return {"pictures": count, "psnr_db": round(psnr(images, decoded, torch.ones_like(mask)), 2),
            "psnr_person_db": round(psnr(images, decoded, mask), 2),
            "scaling_factor": float(vae.config["scaling_factor"])}


class Judge:
    """The judge as plain functions of pixels and captions, for training; runs load it as they load any CLIP scorer."""

    def __init__(self, folder: Path) -> None:
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def embed_texts(self, captions: list[str]) -> Tensor:
        """Unit vectors float32 `[B,D]`."""
        pooled = self.model.text_model(input_ids=tokenize(self.tokenizer, captions)).pooler_output
        return unit(self.model.text_projection(pooled))

    @torch.no_grad()
    def embed_images(self, images: np.ndarray) -> Tensor:
        """Unit vectors float32 `[B,D]` of uint8 images `[B,64,64,3]`."""
        parts = in_batches(len(images), 256, "judge: embed")
        pooled = [self.model.vision_model(pixel_values=to_model_range(images[p])).pooler_output for p in parts]
        return unit(self.model.visual_projection(torch.cat(pooled)))

    def score(self, captions: list[str], images: np.ndarray) -> Tensor:
        """exp(logit_scale) * cosine, float32 `[B]`."""
        cosine = (self.embed_texts(captions) * self.embed_images(images)).sum(-1)
        return self.model.logit_scale.detach().exp() * cosine

    def read(self, figures: list[Figure], images: np.ndarray) -> dict[str, float]:
        """Per attribute, the fraction of images for which the judge ranks the right word above every other."""
        seen = self.embed_images(images)
        return {name: round(float(self._ranks_first(figures, seen, name, words).float().mean()), 3)
                for name, words in VOCABULARIES.items()}

    def _ranks_first(self, figures: list[Figure], seen: Tensor, name: str, words: tuple[str, ...]) -> Tensor:
        variants = [caption(Figure(**{**vars(f), name: word})) for f in figures for word in words]
        texts = self.embed_texts(variants).reshape(len(figures), len(words), -1)
        best = (texts @ seen[..., None]).squeeze(-1).argmax(-1)
        return best == torch.tensor([words.index(getattr(figure, name)) for figure in figures])


def accuracy_by_kind(right: Tensor, other: Tensor, kinds: Tensor) -> dict[str, float]:
    """How often the correct image scores above the other, per kind that occurs and over all."""
    won = (right > other).float()
    found = {kind: round(float(won[kinds == i].mean()), 3) for i, kind in enumerate(KINDS) if bool((kinds == i).any())}
    return {**found, "all": round(float(won.mean()), 3)}


def evaluate_judge(folder: Path, vae: AutoencoderKL, count: int, target: Path | None = None) -> dict:
    """Per kind of defect, how often the correct image gets the higher score: as rendered, through the VAE, and where
    the target generated both (if there is one)."""
    judge = Judge(folder)
    pairs = make_pairs(vae, count * len(KINDS), split="test", seed=HELD_OUT_SEED)
    views: dict[str, tuple[Pairs, Tensor]] = {"clean": (pairs, pairs.clean), "decoded": (pairs, pairs.decoded)}
    if target is not None:
        made = make_generated_pairs(target, count * GENERATED_KINDS, split="test", seed=HELD_OUT_SEED)
        views["generated"] = made, made.decoded
    accuracy = {}
    for view, (shown, images) in views.items():
        right, other = (judge.score(shown.captions, images[:, side].numpy()) for side in (0, 1))
        accuracy[view] = accuracy_by_kind(right, other, shown.kinds)
    figures, images, _ = held_out(count)
    return {"pairs_per_kind": count, "accuracy": accuracy, "reads_right_pictures": judge.read(figures, images),
            "logit_scale": round(float(judge.model.logit_scale.exp()), 2)}


def evaluate_inspector(folder: Path, vae: AutoencoderKL, count: int) -> dict:
    """Per kind of defect, as rendered and through the VAE: how often the correct image gets the higher score, and the
    fraction of images that it calls defective (`right`: of correct ones)."""
    inspector = load_inspector(folder)
    pairs = make_pairs(vae, count * len(KINDS), split="test", seed=HELD_OUT_SEED)
    figures = [parse_caption(text) for text in pairs.captions]
    accuracy, called = {}, {}
    for view in ("clean", "decoded"):
        images = getattr(pairs, view).numpy()
        right, other = (inspect(inspector, figures, images[:, side]) for side in (0, 1))
        accuracy[view] = accuracy_by_kind(right, other, pairs.kinds)
        broken = (other < 0).float()
        called[view] = {kind: round(float(broken[pairs.kinds == i].mean()), 3) for i, kind in enumerate(KINDS)}
        called[view] = {"right": round(float((right < 0).float().mean()), 3), **called[view]}
    return {"pairs_per_kind": count, "accuracy": accuracy, "called_defective": called}


def evaluate_target(folder: Path, judge_folder: Path, inspector_folder: Path, count: int) -> dict:
    """How judge and inspector score images for validation prompts, and correct drawings of them through the VAE."""
    judge, inspector, pipeline = Judge(judge_folder), load_inspector(inspector_folder), load_pipeline(folder)
    texts = prompts("validation", count, seed=0)
    figures = [parse_caption(text) for text in texts]
    right, _ = render_batch(figures, range(HELD_OUT_SEED, HELD_OUT_SEED + count))
    right = to_pixels(decode(pipeline.vae, encode(pipeline.vae, right, name="target: right")))
    generated = generate(pipeline, texts, steps=STEPS, guidance=GUIDANCE, seeds=list(range(count)))
    scores, right_scores = judge.score(texts, generated), judge.score(texts, right)
    defective = [float((inspect(inspector, figures, images) < 0).float().mean()) for images in (generated, right)]
    return {"prompts": count, "steps": STEPS, "guidance": GUIDANCE, "score": round(float(scores.mean()), 3),
            "score_of_right_pictures": round(float(right_scores.mean()), 3),
            "share_above_right_picture": round(float((scores > right_scores).float().mean()), 3),
            "defective": round(defective[0], 3), "defective_right_pictures": round(defective[1], 3),
            "reads": judge.read(figures, generated), "reads_right_pictures": judge.read(figures, right)}
