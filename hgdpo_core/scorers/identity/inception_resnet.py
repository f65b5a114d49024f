"""Inception-ResNet-v1 (arXiv:1602.07261) as FaceNet's ports have it: names and shapes of facenet-pytorch's weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

EPSILON = 0.001
Size = int | tuple[int, int]


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: Size = 1, stride: int = 1, padding: Size = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class Branches(nn.Module):
    """Modules that read the same, branch0, branch1, ...: their outputs as further channels."""

    def __init__(self, branches: Sequence[nn.Module]):
        super().__init__()
        for number, branch in enumerate(branches):
            self.add_module(f"branch{number}", branch)
        self._count = len(branches)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.get_submodule(f"branch{number}")(x) for number in range(self._count)], dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.branch(x)


class Residual(Branches):
    """Branches, joined to the width of the input, scaled and added to it."""

    def __init__(self, branches: Sequence[nn.Module], joined: int, width: int, scale: float, *, is_last: bool = False):
        super().__init__(branches)
        self.conv2d = nn.Conv2d(joined, width, 1)
        self._scale, self._is_last = scale, is_last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2d(self.branch(x)) * self._scale + x
        return x if self._is_last else F.relu(x)


def _block35() -> Residual:
    return Residual([Conv(256, 32), nn.Sequential(Conv(256, 32), Conv(32, 32, 3, padding=1)),
                     nn.Sequential(Conv(256, 32), Conv(32, 32, 3, padding=1), Conv(32, 32, 3, padding=1))],
                    96, 256, 0.17)


def _block17() -> Residual:
    return Residual([Conv(896, 128), nn.Sequential(Conv(896, 128), Conv(128, 128, (1, 7), padding=(0, 3)),
                                                   Conv(128, 128, (7, 1), padding=(3, 0)))], 256, 896, 0.10)


def _block8(scale: float = 0.20, *, is_last: bool = False) -> Residual:
    return Residual([Conv(1792, 192), nn.Sequential(Conv(1792, 192), Conv(192, 192, (1, 3), padding=(0, 1)),
                                                    Conv(192, 192, (3, 1), padding=(1, 0)))],
                    384, 1792, scale, is_last=is_last)


class InceptionResnet(nn.Module):
    """Faces [B, 3, 160, 160], RGB in about -1..1, to L2-normalised embeddings [B, 512]."""

    def __init__(self):
        super().__init__()
        self.conv2d_1a, self.conv2d_2a = Conv(3, 32, 3, stride=2), Conv(32, 32, 3)
        self.conv2d_2b, self.conv2d_3b = Conv(32, 64, 3, padding=1), Conv(64, 80)
        self.conv2d_4a, self.conv2d_4b = Conv(80, 192, 3), Conv(192, 256, 3, stride=2)
        self.repeat_1 = nn.Sequential(*(_block35() for _ in range(5)))
        self.mixed_6a = Branches([Conv(256, 384, 3, stride=2), nn.Sequential(
            Conv(256, 192), Conv(192, 192, 3, padding=1), Conv(192, 256, 3, stride=2)), nn.MaxPool2d(3, stride=2)])
        self.repeat_2 = nn.Sequential(*(_block17() for _ in range(10)))
        self.mixed_7a = Branches([
            nn.Sequential(Conv(896, 256), Conv(256, 384, 3, stride=2)),
            nn.Sequential(Conv(896, 256), Conv(256, 256, 3, stride=2)),
            nn.Sequential(Conv(896, 256), Conv(256, 256, 3, padding=1), Conv(256, 256, 3, stride=2)),
            nn.MaxPool2d(3, stride=2)])
        self.repeat_3 = nn.Sequential(*(_block8() for _ in range(5)))
        self.block8 = _block8(1.0, is_last=True)
        self.last_linear = nn.Linear(1792, 512, bias=False)
        self.last_bn = nn.BatchNorm1d(512, eps=EPSILON)

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(faces)))
        x = self.conv2d_3b(F.max_pool2d(x, 3, stride=2))
        x = self.repeat_1(self.conv2d_4b(self.conv2d_4a(x)))
        x = self.repeat_2(self.mixed_6a(x))
        x = self.block8(self.repeat_3(self.mixed_7a(x)))
        return F.normalize(self.last_bn(self.last_linear(x.mean(dim=(2, 3)))))
