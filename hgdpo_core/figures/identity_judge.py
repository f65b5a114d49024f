"""The identity judge: who is in an image, whatever the pose and the place.

A small convolutional network of its own embeds whole images and cut-out people alike; two images show the same person
where their embeddings are close. It was trained on people whom no other network has seen.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .dataset import to_model_range
from .identities import TRAITS
from .inspector import Block

EMBEDDING = 64
SIZES = tuple(len(values) for values in TRAITS.values())
BATCH = 256


class IdentityNetwork(nn.Module):
    """Images `[B,3,64,64]` in [-1, 1] to embeddings `[B,64]` of length 1; in training, to the traits' logits too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, 2, 2)
        self.blocks = nn.Sequential(Block(16, 32, 2), Block(32, 48, 1), Block(48, 64, 2))
        self.norm = nn.GroupNorm(8, 64)
        self.embedding = nn.Linear(64 * 16, EMBEDDING)
        self.heads = nn.Linear(EMBEDDING, sum(SIZES))

    def features(self, images: Tensor) -> Tensor:
        """`[B,64]`, of any length."""
        seen = F.silu(self.norm(self.blocks(self.stem(images))))
        return self.embedding(F.adaptive_avg_pool2d(seen, 4).flatten(1)).float()

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.features(images), dim=-1)


@torch.no_grad()
def embed_people(network: IdentityNetwork, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """float32 `[B,64]` of length 1, of uint8 images `[B,64,64,3]`."""
    pixels = to_model_range(np.stack(list(images)))
    return torch.cat([network(part) for part in pixels.split(BATCH)]).numpy()


def save_identity_judge(network: IdentityNetwork, folder: Path) -> None:
    """Write the weights in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def load_identity_judge(folder: Path) -> IdentityNetwork:
    network = IdentityNetwork()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network.eval().requires_grad_(False)
