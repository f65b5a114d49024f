"""The judge: a small CLIP in the shape of PickScore, score = exp(logit_scale) * cosine(text, image).

Trained with PickScore's objective (arXiv:2305.01569, section 4): of two pictures for one caption, the softmax
of their scores should favour the better one. A contrastive term over the batch, and heads that name what is
drawn and what is wrong (thrown away afterwards), only make it learn from little.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from .judge_data import KINDS, Pairs, load_pairs, make_pairs, save_pairs
from .loop import Plan, open_in_float32, train
from .people import VOCABULARIES, Figure, caption, change_attributes, parse_caption
from .train_tokenizer import JUDGE_TOKENS, load_tokenizer, tokenize

PLAN = Plan(steps=2000, batch=48, learning_rate=1e-3, weight_decay=0.05)
PAIRS = 12000
# A limb is a small part of a picture, and a missing one leaves nothing to see: the judge needs more of them.
TRAINING_KINDS = (*KINDS, "missing_limb", "missing_limb", "detached_limb", "extra_limb")

# Colours and places tell a batch's pictures apart without person or pose, so captions with one word changed
# are compared as well.
CAPTIONS_WEIGHT = 0.5
CHANGED_CAPTIONS = 2
CONTRASTIVE_WEIGHT = 0.3
HEADS_WEIGHT = 0.3
SHIFT_PX = 2


def new_judge(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIPModel with about 1.4 million parameters, for 64 px pictures."""
    # Without its own ids the text tower looks for CLIP's token 49407, never finds it, and pools the same for
    # any text.
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=JUDGE_TOKENS,
        projection_dim=128,
        **ids,
    )
    vision = dict(
        image_size=64,
        patch_size=8,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=128,
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128, **ids))


def save_processor(tokenizer_folder: Path, folder: Path) -> None:
    """The judge's processor: pictures of any size to [-1, 1] at 64 px by PIL, texts padded and cut at 77."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    CLIPProcessor(images, load_tokenizer(tokenizer_folder, JUDGE_TOKENS)).save_pretrained(folder)
    # transformers 5 puts this into processor_config.json; version 4 and other readers look for it by itself.
    images.save_pretrained(folder)


class JudgeWithHeads(nn.Module):
    """The judge, and for its training one linear head that names the attributes drawn and the kind of
    defect."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.sizes = [*(len(words) for words in VOCABULARIES.values()), len(KINDS) + 1]
        self.heads = nn.Linear(clip.visual_projection.in_features, sum(self.sizes))

    def forward(self, ids: Tensor, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Unit text embeddings `[B,D]`, unit image embeddings `[I,D]`, and the heads' logits `[I,size]`
        each."""
        pooled = self.clip.vision_model(pixel_values=images).pooler_output
        text = self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)
        named = self.heads(pooled).float().split(self.sizes, dim=-1)
        return unit(text), unit(self.clip.visual_projection(pooled)), list(named)


def unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1)


def preference_loss(right: Tensor, other: Tensor) -> Tensor:
    """-log softmax of the right picture's score among the two, PickScore's objective. Scores `[B]`, result
    `[B]`."""
    return F.softplus(other - right)


def judge_loss(model: JudgeWithHeads, ids: Tensor, changed: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """ids `[B,T]`; changed captions' ids `[K*B,T]`; images `[2B,3,64,64]`, the B right ones first; labels
    `[2B,7]` for the heads."""
    texts, pictures, named = model(torch.cat([ids, changed]), images)
    scale = model.clip.logit_scale.exp().clamp(max=100)
    batch = len(ids)
    right, own = pictures[:batch], torch.arange(batch)
    scores = scale * texts[:batch] @ pictures.T  # [B,2B]
    pairs = preference_loss(scores[own, own], scores[own, own + batch]).mean()
    wrong_texts = scale * (texts[batch:].reshape(-1, batch, texts.shape[-1]) * right).sum(-1)  # [K,B]
    captions = preference_loss(scores[own, own], wrong_texts).mean()
    among_images = F.cross_entropy(scores, own)
    among_texts = F.cross_entropy(scores[:, :batch].T, own)
    heads = sum((F.cross_entropy(logits, labels[:, i]) for i, logits in enumerate(named)), torch.zeros(()))
    contrastive = among_images + among_texts
    return pairs + CAPTIONS_WEIGHT * captions + CONTRASTIVE_WEIGHT * contrastive + HEADS_WEIGHT * heads


def change_captions(figures: list[Figure], rng: np.random.Generator) -> list[str]:
    """`CHANGED_CAPTIONS` captions a figure, each with one attribute changed, in the order `[K,B]`."""
    names = list(VOCABULARIES)
    return [
        caption(change_attributes(figure, rng, names=(names[int(rng.integers(len(names)))],)))
        for _ in range(CHANGED_CAPTIONS)
        for figure in figures
    ]


def sample_pairs(pairs: Pairs, batch: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The indices `[B]`, images and labels of a batch for `judge_loss`: each pair clean or through the VAE,
    mirrored or not, shifted by up to two pixels."""
    chosen = torch.from_numpy(rng.integers(len(pairs.captions), size=batch))
    through = torch.from_numpy(rng.random(batch) < 0.65)[:, None, None, None, None]
    images = torch.where(through, pairs.decoded[chosen], pairs.clean[chosen])
    images = images.transpose(0, 1).reshape(2 * batch, 64, 64, 3)
    images = augment(images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1, rng)
    kinds = torch.stack([torch.zeros(batch, dtype=torch.long), pairs.kinds[chosen] + 1])
    labels = torch.cat([pairs.attributes[chosen].transpose(0, 1), kinds[..., None]], dim=-1)
    return chosen, images, labels.reshape(2 * batch, -1)


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    mirrored = torch.from_numpy(rng.random(len(images)) < 0.5)[:, None, None, None]
    images = torch.where(mirrored, images.flip(-1), images)
    padded = F.pad(images, (SHIFT_PX,) * 4, mode="replicate")
    x, y = rng.integers(2 * SHIFT_PX + 1, size=2)
    return padded[..., y : y + 64, x : x + 64].contiguous()


def train_judge(
    folder: Path, tokenizer_folder: Path, vae: AutoencoderKL, plan: Plan, *, pairs: int, seed: int, work: Path
) -> None:
    """Train the judge and write it, with its processor, as a transformers folder in fp16."""
    tokenizer = load_tokenizer(tokenizer_folder)
    path = work / "judge-pairs.safetensors"
    if not path.exists():
        save_pairs(make_pairs(vae, pairs, split="train", seed=seed, kinds=TRAINING_KINDS), path)
    data = load_pairs(path)
    ids, figures = tokenize(tokenizer, data.captions), [parse_caption(text) for text in data.captions]
    torch.manual_seed(seed)
    model = JudgeWithHeads(new_judge(tokenizer))
    # On a CPU the backward pass of torch's fused attention takes longer than all the rest together.
    model.clip.set_attn_implementation("eager")

    def loss_of(rng: np.random.Generator, _: torch.Generator) -> Tensor:
        chosen, images, labels = sample_pairs(data, plan.batch, rng)
        changed = tokenize(tokenizer, change_captions([figures[i] for i in chosen.tolist()], rng))
        return judge_loss(model, ids[chosen], changed, images, labels)

    average = train(model, loss_of, plan, name="judge", seed=seed, checkpoint=work / "checkpoint.pt")
    judge = average.get_submodule("clip")
    assert isinstance(judge, CLIPModel)
    judge.half().save_pretrained(folder)
    open_in_float32(folder)
    save_processor(tokenizer_folder, folder)
