"""Train the identity judge: two images of a person close to each other, those of others far."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from ..dataset import to_model_range, to_pixels
from ..identities import cut_out, distinct_people, draw_view
from ..identity_judge import IdentityNetwork, embed_people, save_identity_judge
from .concept_encoder import trait_loss
from .judge_data import augment
from .loop import Plan, in_batches, save_tensors, train
from .vae import decode, encode

PLAN = Plan(steps=600, batch=32, learning_rate=2e-3, warm_up=50, average=0.99)
PEOPLE = 3000
SEED = 4000  # apart from the other networks'
TEMPERATURE = 0.1
VIEWS = ("clean", "decoded", "other", "cut")
"""Of each person: an image, the same through the VAE, another one through the VAE, and a third cut out."""


def person_views(vae: AutoencoderKL, split: str, count: int, *, seed: int, path: Path) -> tuple[Tensor, Tensor]:
    """uint8 `[N,4,64,64,3]`, the VIEWS of each of N people of a split, and their traits int64 `[N,7]`."""
    if not path.exists():
        people, rng = distinct_people(split, count, seed), np.random.default_rng([seed, 44])
        parts = []
        for part in in_batches(count, 64, "identity: render"):
            drawn = [[draw_view(person, rng).render() for _ in range(3)] for person in people[part]]
            whole = np.stack([np.asarray(view[0]) for views in drawn for view in views[:2]])
            decoded = to_pixels(decode(vae, encode(vae, whole, name="identity: encode")))
            cut = np.stack([np.asarray(cut_out(*views[2])) for views in drawn])
            parts.append(np.stack([whole[::2], decoded[::2], decoded[1::2], cut], axis=1))
        save_tensors(path, {"images": torch.from_numpy(np.concatenate(parts)),
                            "traits": torch.tensor([person.indices() for person in people])})
    tensors = load_file(path)
    return tensors["images"], tensors["traits"]


def train_identity_judge(folder: Path, vae: AutoencoderKL, plan: Plan, *, people: int, seed: int,
                         work: Path) -> IdentityNetwork:
    """Train the judge on people of its own split, and write it."""
    seed += SEED
    images, traits = person_views(vae, "judge", people, seed=seed, path=work / "people.safetensors")
    torch.manual_seed(seed)
    network = IdentityNetwork()

    def loss_of(rng: np.random.Generator, _: torch.Generator) -> Tensor:
        chosen = torch.from_numpy(rng.permutation(len(images))[:plan.batch])
        pairs = [images[chosen, torch.from_numpy(rng.choice(views, len(chosen)))] for views in ([0, 1], [2, 3])]
        seen = [network.features(augment(to_model_range(side.numpy()), rng)[0]) for side in pairs]
        return contrast(*seen) + sum(trait_loss(network.heads(side), traits[chosen]) for side in seen) / 4

    average = train(network, loss_of, plan, name="identity judge", seed=seed, checkpoint=work / "checkpoint.pt")
    save_identity_judge(average, folder)
    return average


def contrast(first: Tensor, second: Tensor) -> Tensor:
    """How badly each of B people is found among the B by their other image, in both directions; features `[B,D]`."""
    closeness = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T / TEMPERATURE
    right = torch.arange(len(closeness))
    return (F.cross_entropy(closeness, right) + F.cross_entropy(closeness.T, right)) / 2


def evaluate_identity_judge(network: IdentityNetwork, vae: AutoencoderKL, count: int, *, seed: int,
                            path: Path) -> dict[str, float]:
    """How often a test person's cut-out is closest to their own image through the VAE, among 20 of one class word."""
    images, traits = person_views(vae, "test", count, seed=seed, path=path)
    cut, whole = (embed_people(network, images[:, view].numpy()) for view in (3, 2))
    rng, right = np.random.default_rng(seed), []
    for row in range(count):
        others = np.flatnonzero((traits[:, 0] == traits[row, 0]).numpy() & (np.arange(count) != row))
        others = rng.choice(others, 19, replace=False)
        right.append(whole[row] @ cut[row] > (cut[others] @ whole[row]).max())
    return {"top_1_of_20": round(float(np.mean(right)), 4), "images": count}
