"""The judge: a small CLIP in the shape of PickScore, score = exp(logit_scale) * cosine(text, image).

Trained with PickScore's objective (arXiv:2305.01569, section 4): of two images for one caption, the softmax of their
scores should favour the better one. A contrastive term over the batch, and heads that predict attributes, counts of
limbs and the positions of head, torso, arms and legs (dropped after training), let it learn from little data: without
them it took ten times the steps to notice a limb.

It is trained in two stages: on rendered images, clean and through the VAE, then also on images that the target
generated, for those are what it will rank.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from ..dataset import to_model_range
from ..inspector import SIZES
from ..people import VOCABULARIES, Figure, caption, change_attributes, parse_caption
from ..renderer import PARTS
from .generated_pairs import make_generated_pairs
from .judge_data import KINDS, UNKNOWN, Pairs, augment, cached_pairs, make_pairs
from .loop import Plan, open_in_float32, train
from .tokenizer import JUDGE_TOKENS, load_tokenizer, special_ids, text_settings, tokenize

PLAN = Plan(steps=2200, batch=48, learning_rate=1e-3, weight_decay=0.05)
PAIRS = 20000
CALIBRATION = Plan(steps=900, batch=48, learning_rate=3e-4, weight_decay=0.05, warm_up=100)
GENERATED_PAIRS = 4000
# A limb is a small part of an image, and a missing one leaves nothing to see: the judge needs more of them.
TRAINING_KINDS = (*KINDS, "missing_limb", "missing_limb", "detached_limb", "extra_limb")

# Colours and places distinguish a batch's images without person or pose, so captions with one word changed are
# compared as well.
CAPTIONS_WEIGHT = 0.5
CHANGED_CAPTIONS = 2
CONTRASTIVE_WEIGHT = 0.3
HEADS_WEIGHT = 0.3
PARTS_WEIGHT = 2.0


def new_judge(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIPModel with about 1.4 million parameters, for 64 px images."""
    text = text_settings(tokenizer, JUDGE_TOKENS)
    vision = dict(image_size=64, patch_size=8, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
                  num_attention_heads=4, projection_dim=128)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128, **special_ids(tokenizer)))


def save_processor(tokenizer_folder: Path, folder: Path) -> None:
    """The judge's processor: images of any size to [-1, 1] at 64 px by PIL, texts padded and cut at 77."""
    images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64},
                                   image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
    CLIPProcessor(images, load_tokenizer(tokenizer_folder, JUDGE_TOKENS)).save_pretrained(folder)
    # transformers 5 puts this into processor_config.json; version 4 and other readers look for a file of its own.
    images.save_pretrained(folder)


class JudgeWithHeads(nn.Module):
    """The judge, and for its training linear heads: attributes and counts of an image, parts of each patch."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        width = clip.visual_projection.in_features
        self.heads, self.parts = nn.Linear(width, sum(SIZES)), nn.Linear(width, len(PARTS))

    def forward(self, ids: Tensor, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """Unit text embeddings `[B,D]`, unit image embeddings `[I,D]`, the heads' logits `[I,size]` each, and the
        parts' `[I,64,4]`."""
        seen = self.clip.vision_model(pixel_values=images)
        text = self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)
        named = self.heads(seen.pooler_output).float().split(SIZES, dim=-1)
        parts = self.parts(seen.last_hidden_state[:, 1:]).float()
        return unit(text), unit(self.clip.visual_projection(seen.pooler_output)), list(named), parts


@dataclass(frozen=True)
class Batch:
    """B pairs as 2B images, the correct ones first."""

    images: Tensor  # float32 [2B,3,64,64] in [-1, 1]
    labels: Tensor  # int64 [2B,11], answers of the heads, UNKNOWN for images of a target
    parts: Tensor  # float32 [2B,64,4] in 0..1
    known: Tensor  # bool [2B], whether labels and parts are known


def unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1)


def preference_loss(right: Tensor, other: Tensor) -> Tensor:
    """-log softmax of the correct image's score among the two, PickScore's objective. Scores `[B]`, result `[B]`."""
    return F.softplus(other - right)


def judge_loss(model: JudgeWithHeads, ids: Tensor, changed: Tensor, batch: Batch) -> Tensor:
    """ids `[B,T]`; changed captions' ids `[K*B,T]`; the batch's images are the B correct ones, then the others."""
    texts, images, named, parts = model(torch.cat([ids, changed]), batch.images)
    scale = model.clip.logit_scale.exp().clamp(max=100)
    count = len(ids)
    right, own = images[:count], torch.arange(count)
    scores = scale * texts[:count] @ images.T  # [B,2B]
    pairs = preference_loss(scores[own, own], scores[own, own + count]).mean()
    wrong_texts = scale * (texts[count:].reshape(-1, count, texts.shape[-1]) * right).sum(-1)  # [K,B]
    captions = preference_loss(scores[own, own], wrong_texts).mean()
    contrastive = F.cross_entropy(scores, own) + F.cross_entropy(scores[:, :count].T, own)
    heads = [F.cross_entropy(logits, batch.labels[:, i], ignore_index=UNKNOWN) for i, logits in enumerate(named)]
    where = F.binary_cross_entropy_with_logits(parts[batch.known], batch.parts[batch.known])
    return (pairs + CAPTIONS_WEIGHT * captions + CONTRASTIVE_WEIGHT * contrastive
            + HEADS_WEIGHT * torch.stack(heads).sum() + PARTS_WEIGHT * where)


def change_captions(figures: list[Figure], rng: np.random.Generator) -> list[str]:
    """`CHANGED_CAPTIONS` captions per figure, each with one attribute changed, in the order `[K,B]`."""
    names = list(VOCABULARIES)
    return [caption(change_attributes(figure, rng, names=(names[int(rng.integers(len(names)))],)))
            for _ in range(CHANGED_CAPTIONS) for figure in figures]


def sample_pairs(pairs: Pairs, batch: int, rng: np.random.Generator) -> tuple[Tensor, Batch]:
    """The indices `[B]` of random pairs and their batch: each pair clean or through the VAE, mirrored or not, shifted
    by up to two pixels."""
    chosen = torch.from_numpy(rng.integers(len(pairs.captions), size=batch))
    through = torch.from_numpy(rng.random(batch) < 0.65)[:, None, None, None, None]
    images = torch.where(through, pairs.decoded[chosen], pairs.clean[chosen])
    images = to_model_range(images.transpose(0, 1).reshape(2 * batch, 64, 64, 3).numpy())
    labels = torch.cat([pairs.attributes[chosen], pairs.counts[chosen]], dim=-1)
    labels = labels.transpose(0, 1).reshape(2 * batch, -1)
    parts = pairs.parts[chosen].transpose(0, 1).reshape(2 * batch, 8, 8, -1).float() / 255
    images, mirrored = augment(images, rng)
    parts = torch.where(mirrored[:, None, None, None], parts.flip(2), parts).flatten(1, 2)
    return chosen, Batch(images, labels, parts, labels[:, 0] != UNKNOWN)


def train_judge(folder: Path, tokenizer_folder: Path, vae: AutoencoderKL, plan: Plan, *, pairs: int, seed: int,
                work: Path) -> None:
    """Train the judge on rendered images and write it, with its processor, as a transformers folder in fp16."""
    tokenizer = load_tokenizer(tokenizer_folder)
    data = cached_pairs(work / "judge-pairs.safetensors",
                        lambda: make_pairs(vae, pairs, split="train", seed=seed, kinds=TRAINING_KINDS))
    torch.manual_seed(seed)
    model = JudgeWithHeads(new_judge(tokenizer))
    judge = fit(model, tokenizer, [(data, plan.batch)], plan, seed=seed, checkpoint=work / "checkpoint.pt")
    save_judge(judge, tokenizer_folder, folder)


def calibrate_judge(folder: Path, drawn_judge: Path, target: Path, vae: AutoencoderKL, plan: Plan, *, pairs: int,
                    seed: int, work: Path) -> None:
    """Train the drawn judge further, with a third of its pairs by the target, and write it like `train_judge`."""
    tokenizer = load_tokenizer(target / "tokenizer")
    rendered = cached_pairs(work / "judge-pairs.safetensors",
                            lambda: make_pairs(vae, 2 * pairs, split="train", seed=seed + 1, kinds=TRAINING_KINDS))
    generated = cached_pairs(work / "generated-pairs.safetensors",
                             lambda: make_generated_pairs(target, pairs, split="train", seed=seed))
    torch.manual_seed(seed)
    model = JudgeWithHeads(CLIPModel.from_pretrained(drawn_judge, dtype=torch.float32))
    third = max(plan.batch // 3, 1)
    sources = [(rendered, plan.batch - third), (generated, third)]
    judge = fit(model, tokenizer, sources, plan, seed=seed, checkpoint=work / "checkpoint.pt")
    save_judge(judge, target / "tokenizer", folder)


def fit(model: JudgeWithHeads, tokenizer: CLIPTokenizer, sources: list[tuple[Pairs, int]], plan: Plan, *, seed: int,
        checkpoint: Path) -> CLIPModel:
    """Train on batches of so many pairs from each source; returns the averaged judge without its heads."""
    # On a CPU the backward pass of torch's fused attention takes longer than all the rest together.
    model.clip.set_attn_implementation("eager")
    tokens = [tokenize(tokenizer, pairs.captions) for pairs, _ in sources]

    def loss_of(rng: np.random.Generator, _: torch.Generator) -> Tensor:
        ids, figures, batches = [], [], []
        for (pairs, count), known in zip(sources, tokens, strict=True):
            chosen, batch = sample_pairs(pairs, count, rng)
            ids.append(known[chosen])
            figures += [parse_caption(pairs.captions[i]) for i in chosen.tolist()]
            batches.append(batch)
        changed = tokenize(tokenizer, change_captions(figures, rng))
        return judge_loss(model, torch.cat(ids), changed, join_batches(batches))

    return train(model, loss_of, plan, name="judge", seed=seed, checkpoint=checkpoint).clip


def join_batches(batches: list[Batch]) -> Batch:
    """One batch with the correct images of all before the others of all."""

    def join(name: str) -> Tensor:
        halves = [getattr(batch, name).chunk(2) for batch in batches]
        return torch.cat([half[side] for side in (0, 1) for half in halves])

    return Batch(**{field.name: join(field.name) for field in fields(Batch)})


def save_judge(judge: CLIPModel, tokenizer_folder: Path, folder: Path) -> None:
    """The judge in fp16, with its processor, as a transformers folder."""
    judge.half().save_pretrained(folder)
    open_in_float32(folder)
    save_processor(tokenizer_folder, folder)
