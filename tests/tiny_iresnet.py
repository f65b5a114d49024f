"""ArcFace's network as insightface publishes it (iresnet, arXiv:1801.07698), twice: written plainly in torch with its
normalisations apart, and as an ONNX graph of the public files' layout, where those after a convolution are folded into
it. Random weights; `DEPTHS` are those of w600k_r50.
"""

import itertools
from pathlib import Path

import numpy as np
import tiny_onnx
import torch
import torch.nn.functional as F

DEPTHS = (3, 4, 14, 3)
EPSILON = 1e-5
OUTPUTS = 512
Norm = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Scale, shift, running mean and running variance."""


class Weights:
    """Of one block after the other, by name: convolutions, normalisations, slopes."""

    def __init__(self, width: int, seed: int = 0):
        self.generator, self.width = torch.Generator().manual_seed(seed), width
        self.tensors: dict[str, torch.Tensor] = {}
        self.norms: dict[str, Norm] = {}
        self.blocks: list[tuple[str, int]] = []
        self._conv("stem", 3, width, 3)
        self._norm("stem", width)
        self._slope("stem", width)
        inputs = width
        for stage, depth in enumerate(DEPTHS):
            outputs = width * 2**stage
            for number in range(depth):
                self._block(f"{stage}.{number}", inputs, outputs, first=number == 0)
                inputs = outputs
        self._norm("last", inputs)
        self.tensors["fc"] = self._random(OUTPUTS, inputs * 49) / (inputs * 49) ** 0.5
        self.tensors["fc.bias"] = self._random(OUTPUTS) * 0.1
        self._norm("features", OUTPUTS)

    def _block(self, name: str, inputs: int, outputs: int, *, first: bool) -> None:
        self.blocks.append((name, 2 if first else 1))
        self._norm(f"{name}.1", inputs)
        self._conv(f"{name}.1", inputs, outputs, 3)
        self._norm(f"{name}.2", outputs)
        self._slope(name, outputs)
        self._conv(f"{name}.2", outputs, outputs, 3)
        self._norm(f"{name}.3", outputs)
        if first:
            self._conv(f"{name}.down", inputs, outputs, 1)
            self._norm(f"{name}.down", outputs)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _conv(self, name: str, inputs: int, outputs: int, side: int) -> None:
        self.tensors[f"{name}.conv"] = self._random(outputs, inputs, side, side) / (inputs * side**2) ** 0.5

    def _norm(self, name: str, width: int) -> None:
        self.norms[name] = (1 + 0.2 * self._random(width), 0.2 * self._random(width), 0.2 * self._random(width),
                            0.5 + torch.rand(width, generator=self.generator))

    def _slope(self, name: str, width: int) -> None:
        self.tensors[f"{name}.slope"] = 0.25 + 0.1 * self._random(width)


@torch.no_grad()
def embed(weights: Weights, pixels: torch.Tensor) -> torch.Tensor:
    """float32 [B, 512], not normalised, of faces [B, 3, 112, 112] in -1..1, RGB."""
    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        scale, shift, mean, variance = weights.norms[name]
        return F.batch_norm(x, mean, variance, scale, shift, eps=EPSILON)

    own = weights.tensors
    x = F.prelu(norm("stem", F.conv2d(pixels, own["stem.conv"], padding=1)), own["stem.slope"])
    for name, stride in weights.blocks:
        y = F.conv2d(norm(f"{name}.1", x), own[f"{name}.1.conv"], padding=1)
        y = F.prelu(norm(f"{name}.2", y), own[f"{name}.slope"])
        y = norm(f"{name}.3", F.conv2d(y, own[f"{name}.2.conv"], padding=1, stride=stride))
        if f"{name}.down.conv" in own:
            x = norm(f"{name}.down", F.conv2d(x, own[f"{name}.down.conv"], stride=stride))
        x = x + y
    x = norm("last", x).flatten(1)
    return norm("features", F.linear(x, own["fc"], own["fc.bias"]))


def save_onnx(weights: Weights, path: Path, *, scales: bool = False) -> Path:
    """The same network as a file; with `scales` its graph prepares the pixels itself, as some public files do."""
    graph = _Graph(weights)
    start = graph.scaled("data") if scales else "data"
    x = graph.prelu("stem", graph.conv("stem", "stem", start, side=3))
    for name, stride in weights.blocks:
        y = graph.conv(f"{name}.1", f"{name}.2", graph.norm(f"{name}.1", x), side=3)
        y = graph.conv(f"{name}.2", f"{name}.3", graph.prelu(name, y), side=3, stride=stride)
        if f"{name}.down.conv" in weights.tensors:
            x = graph.conv(f"{name}.down", f"{name}.down", x, side=1, stride=stride)
        x = graph.add("Add", [y, x])
    flat = graph.add("Flatten", [graph.norm("last", x)], axis=1)
    full = graph.add("Gemm", [flat, graph.keep("fc", weights.tensors["fc"]),
                              graph.keep("fc.bias", weights.tensors["fc.bias"])], transB=1)
    graph.norm("features", full, output="fc1")
    return tiny_onnx.save_graph(path, graph.nodes, graph.constants, ("N", 3, 112, 112), OUTPUTS)


class _Graph:
    def __init__(self, weights: Weights):
        self.weights, self.nodes, self.constants = weights, list[bytes](), dict[str, np.ndarray]()
        self._names = (f"value{number}" for number in itertools.count())

    def keep(self, name: str, tensor: torch.Tensor) -> str:
        self.constants[name] = np.ascontiguousarray(tensor.numpy(), dtype=np.float32)
        return name

    def add(self, operation: str, inputs: list[str], output: str = "", **attributes: int | float | list[int]) -> str:
        output = output or next(self._names)
        self.nodes.append(tiny_onnx.node(operation, inputs, output, **attributes))
        return output

    def scaled(self, x: str) -> str:
        centred = self.add("Sub", [x, self.keep("mean", torch.tensor([127.5]))])
        return self.add("Mul", [centred, self.keep("factor", torch.tensor([1 / 127.5]))])

    def norm(self, name: str, x: str, output: str = "") -> str:
        kept = [self.keep(f"{name}.norm{number}", tensor) for number, tensor in enumerate(self.weights.norms[name])]
        return self.add("BatchNormalization", [x, *kept], output, epsilon=EPSILON)

    def prelu(self, name: str, x: str) -> str:
        return self.add("PRelu", [x, self.keep(f"{name}.slope", self.weights.tensors[f"{name}.slope"][:, None, None])])

    def conv(self, name: str, norm: str, x: str, *, side: int, stride: int = 1) -> str:
        """A convolution with the normalisation that follows it, as one."""
        scale, shift, mean, variance = self.weights.norms[norm]
        factor = scale / torch.sqrt(variance + EPSILON)
        folded = [self.keep(f"{name}.folded", self.weights.tensors[f"{name}.conv"] * factor[:, None, None, None]),
                  self.keep(f"{name}.bias", shift - mean * factor)]
        return self.add("Conv", [x, *folded], kernel_shape=[side, side], strides=[stride, stride],
                        pads=[side // 2] * 4)
