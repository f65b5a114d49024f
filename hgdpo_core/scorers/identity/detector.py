"""Faces and their five points by YuNet (OpenCV Zoo, MIT licence), without OpenCV.

The network is `face_detection_yunet_2023mar.onnx`. Images are scaled to 640 pixels on their longer side and laid into
the upper left corner of 640x640; a face that is rotated by more than about 45 degrees, or narrower than about 1/40 of
the image, is not found.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hgdpo_core.scorers.identity.sessions import open_session

SIDE = 640
STRIDES = (8, 16, 32)
MIN_SCORE, MAX_OVERLAP = 0.6, 0.3


@dataclass(frozen=True)
class Face:
    """A face in pixels of its image."""

    box: tuple[float, float, float, float]
    """Left, top, width, height."""
    points: np.ndarray
    """float64 [5, 2]: x and y of the eyes, the tip of the nose and the corners of the mouth, from left to right."""
    score: float

    @property
    def area(self) -> float:
        return self.box[2] * self.box[3]


class FaceDetector:
    """YuNet, loaded; may be called from several threads."""

    def __init__(self, path: Path):
        self._session: Any = open_session(path)
        self._outputs = [f"{kind}_{stride}" for stride in STRIDES for kind in ("cls", "obj", "bbox", "kps")]

    def find(self, image: Image.Image) -> list[Face]:
        """The faces of an RGB image, the largest first."""
        scale = SIDE / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        canvas = np.zeros((SIDE, SIDE, 3), dtype=np.float32)
        canvas[:height, :width] = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
        pixels = np.ascontiguousarray(canvas[None, :, :, ::-1].transpose(0, 3, 1, 2))  # BGR, 0..255
        found = self._session.run(self._outputs, {"input": pixels})
        parts = [_decode(stride, *found[4 * number:4 * number + 4]) for number, stride in enumerate(STRIDES)]
        boxes, points, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
        scales = np.array([image.width / width, image.height / height])
        faces = [Face(tuple((boxes[row] * [*scales, *scales]).tolist()), points[row] * scales, float(scores[row]))
                 for row in suppress_overlaps(boxes, scores)]
        return sorted(faces, key=lambda face: -face.area)


def _decode(stride: int, cls: np.ndarray, obj: np.ndarray, box: np.ndarray,
            points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes [F, 4], points [F, 5, 2] and scores [F] of the cells that hold a face, in pixels of the network's input."""
    scores = np.sqrt(cls[0, :, 0].clip(0, 1) * obj[0, :, 0].clip(0, 1)).astype(np.float64)
    kept = np.flatnonzero(scores >= MIN_SCORE)
    cells = np.stack([kept % (SIDE // stride), kept // (SIDE // stride)], axis=1).astype(np.float64)  # column, row
    offsets = box[0, kept].astype(np.float64)
    centres, sizes = (cells + offsets[:, :2]) * stride, np.exp(offsets[:, 2:]) * stride
    spots = (cells[:, None] + points[0, kept].reshape(-1, 5, 2)) * stride
    return np.concatenate([centres - sizes / 2, sizes], axis=1), spots, scores[kept]


def suppress_overlaps(boxes: np.ndarray, scores: np.ndarray) -> list[int]:
    """Rows of boxes [F, 4] (left, top, width, height) that overlap no better one: intersection over union."""
    kept: list[int] = []
    for row in np.argsort(-scores, kind="stable").tolist():
        if all(_overlap(boxes[row], boxes[other]) <= MAX_OVERLAP for other in kept):
            kept.append(row)
    return kept


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[:2] + a[2:], b[:2] + b[2:])
    shared = float(np.prod((high - low).clip(0)))
    return shared / (float(np.prod(a[2:])) + float(np.prod(b[2:])) - shared)
