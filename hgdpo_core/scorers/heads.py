"""The head that ImageReward and the aesthetic predictor share: five linear layers, nothing between them when judging.

Dropout stood between them in training; there never was an activation.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from hgdpo_core.errors import ModelError

LAYERS = (0, 2, 4, 6, 7)
"""Their places in the original nn.Sequential, which counts the dropouts."""


def linear_head(scorer: str, path: Path, tensors: Mapping[str, torch.Tensor], prefix: str) -> torch.nn.Sequential:
    """The head whose tensors are named `<prefix><place>.weight` and `.bias`; float32 [B, D] -> [B, 1]."""
    layers = torch.nn.Sequential()
    for place in LAYERS:
        weight, bias = (tensors.get(f"{prefix}{place}.{kind}") for kind in ("weight", "bias"))
        if weight is None or bias is None:
            raise ModelError(f"scorer {scorer}: {path} lacks {prefix}{place}.weight or its bias: expected the five "
                             "linear layers of the published head")
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.bias.data = weight.float(), bias.float()
        layers.append(layer)
    return layers
