"""Train the concept encoder: a small CLIP vision tower that reads a person's image for the personalised model."""

from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from ..dataset import to_model_range
from ..identities import CONCEPT_PX, TRAITS, augment_concept, concept_image, draw_people, draw_view
from .loop import Plan, in_batches, open_in_float32, save_tensors, train

PLAN = Plan(steps=1500, batch=32, learning_rate=1e-3)
IMAGES = 8000
SEED = 3000  # apart from the other networks'
SIZES = tuple(len(values) for values in TRAITS.values())


def new_encoder() -> CLIPVisionModel:
    """0.6 million parameters; images `[B,3,64,64]` in [-1, 1] to 65 tokens of 128, the first for the whole image."""
    return CLIPVisionModel(CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=3,
                                            num_attention_heads=4, image_size=CONCEPT_PX, patch_size=8,
                                            projection_dim=128))


class EncoderWithHeads(nn.Module):
    """The encoder and what asks it for a person's traits, once of the whole image's token and once of its patches."""

    def __init__(self, encoder: CLIPVisionModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.whole, self.patches = nn.Linear(128, sum(SIZES)), nn.Linear(128, sum(SIZES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all traits `[B, sum of SIZES]`, from either."""
        seen = self.encoder(images)
        return self.whole(seen.pooler_output).float(), self.patches(seen.last_hidden_state[:, 1:].mean(1)).float()


def trait_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Cross entropy of logits `[B, sum of SIZES]`, summed over the traits `[B,7]`."""
    parts = logits.split(SIZES, dim=-1)
    return torch.stack([F.cross_entropy(part, answers[:, i]) for i, part in enumerate(parts)]).sum()


def trait_accuracy(logits: Tensor, answers: Tensor) -> dict[str, float]:
    """How often each trait is the most likely one."""
    parts = logits.split(SIZES, dim=-1)
    right = [float((part.argmax(-1) == answers[:, i]).float().mean()) for i, part in enumerate(parts)]
    return {name: round(value, 4) for name, value in zip(TRAITS, right, strict=True)}


def concept_images(split: str, count: int, *, seed: int, path: Path) -> tuple[Tensor, Tensor]:
    """uint8 `[N,64,64,3]` of as many people of a split, and their traits int64 `[N,7]`; cached in `path`."""
    if not path.exists():
        rng = np.random.default_rng([seed, 99])
        people = draw_people(split, rng)
        views = [draw_view(next(people), rng) for _ in range(count)]
        images = [np.asarray(concept_image(view)) for part in in_batches(count, 256, "concepts: render")
                  for view in views[part]]
        save_tensors(path, {"images": torch.from_numpy(np.stack(images)),
                            "traits": torch.tensor([view.person.indices() for view in views])})
    tensors = load_file(path)
    return tensors["images"], tensors["traits"]


def augmented(images: Tensor, rng: np.random.Generator) -> Tensor:
    """uint8 `[B,64,64,3]` to float32 `[B,3,64,64]` in [-1, 1], each augmented."""
    turned = [np.asarray(augment_concept(Image.fromarray(image), rng)) for image in images.numpy()]
    return to_model_range(np.stack(turned))


@torch.no_grad()
def evaluate_encoder(model: EncoderWithHeads, count: int, *, seed: int, path: Path) -> dict[str, float]:
    """How often each trait of test people is read from their concept image."""
    pictures, traits = concept_images("test", count, seed=seed, path=path)
    return trait_accuracy(model(to_model_range(pictures.numpy()))[0], traits)


def train_encoder(folder: Path, plan: Plan, *, images: int, seed: int, work: Path) -> EncoderWithHeads:
    """Train the encoder on concept images of people of its own split, and write it as a transformers folder in fp16."""
    seed += SEED
    pictures, traits = concept_images("encoder", images, seed=seed, path=work / "concepts.safetensors")
    torch.manual_seed(seed)
    model = EncoderWithHeads(new_encoder())
    model.encoder.set_attn_implementation("eager")

    def loss_of(rng: np.random.Generator, _: torch.Generator) -> Tensor:
        chosen = torch.from_numpy(rng.integers(len(pictures), size=plan.batch))
        batch, answers = augmented(pictures[chosen], rng), traits[chosen]
        return torch.stack([trait_loss(logits, answers) for logits in model(batch)]).sum()

    average = train(model, loss_of, plan, name="concept encoder", seed=seed, checkpoint=work / "checkpoint.pt")
    cast(CLIPVisionModel, nn.Module.half(average.encoder)).save_pretrained(folder)
    open_in_float32(folder)
    nn.Module.float(average.encoder)
    return average
