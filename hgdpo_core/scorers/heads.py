"""The head of ImageReward and of the aesthetic predictor: five linear layers, with nothing between them at inference.

In training there was dropout between them; there never was an activation.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from hgdpo_core.errors import ModelError

LAYERS = (0, 2, 4, 6, 7)
"""Their positions in the original nn.Sequential, which counts the dropouts."""


def linear_head(path: Path, tensors: Mapping[str, torch.Tensor], prefix: str) -> torch.nn.Sequential:
    """The head whose tensors are named `<prefix><position>.weight` and `.bias`; float32 [B, D] -> [B, 1]."""
    layers, width = torch.nn.Sequential(), None
    unknown = sorted(name for name in tensors if name.startswith(prefix)
                     and name.removeprefix(prefix).split(".")[0] not in map(str, LAYERS))
    if unknown:
        raise ModelError(f"{path} holds the unknown {unknown[0]}: expected the five linear layers of the published "
                         "head")
    for position in LAYERS:
        weight, bias = (tensors.get(f"{prefix}{position}.{kind}") for kind in ("weight", "bias"))
        if weight is None or bias is None:
            raise ModelError(f"{path} lacks {prefix}{position}.weight or its bias: expected the five linear layers of "
                             "the published head")
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or width not in (None, weight.shape[1]):
            raise ModelError(f"{path} holds {prefix}{position}.weight {list(weight.shape)} and a bias "
                             f"{list(bias.shape)}, which do not fit each other or the layer before: get a complete "
                             "copy")
        width = weight.shape[0]
        layer = torch.nn.Linear(weight.shape[1], width, device="meta")
        layer.weight, layer.bias = (torch.nn.Parameter(tensor.float()) for tensor in (weight, bias))
        layers.append(layer)
    if width != 1:
        raise ModelError(f"the head in {path} ends in {width} numbers, expected 1: get a complete copy")
    return layers
