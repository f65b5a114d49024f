"""Judges of identity: a face as an embedding; two images show one person where theirs are close.

| judge   | face                         | pixels                      | network                       |
|---------|------------------------------|-----------------------------|-------------------------------|
| sface   | aligned, 112x112             | RGB, 0..255                 | ONNX, 128                     |
| arcface | aligned, 112x112             | RGB, (x - 127.5) / 127.5 *  | ONNX, 512                     |
| vggface | its box, resized to 160x160  | RGB, (x - 127.5) / 128      | Inception-ResNet-v1, 512      |

* a graph that begins with Sub and Mul does that itself, and is given 0..255.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image

from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import ModelError
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.models.networks import check_finite, compare_shapes, shapes_of
from hgdpo_core.scorers.identity.alignment import SIDE, align_face, crop_box
from hgdpo_core.scorers.identity.detector import Face, FaceDetector
from hgdpo_core.scorers.identity.inception_resnet import InceptionResnet
from hgdpo_core.scorers.identity.sessions import first_operations, open_session
from hgdpo_core.scorers.weights import read_tensors

VGGFACE_SIDE = 160
SCALED_INSIDE = ["Sub", "Mul"]


class Cut(NamedTuple):
    """The face of an image as a judge's network sees it, and how many faces the image shows."""

    face: np.ndarray | None
    """uint8 [S, S, 3], of the largest face; None where there is none."""
    faces: int


class IdentityJudge(ABC):
    """A loaded judge. An embedding depends on its own image alone, up to float rounding."""

    name: ClassVar[str]

    @abstractmethod
    def cut(self, image: Image.Image) -> Cut:
        """What `embed` is given of an RGB image; computed on the CPU, in any thread."""

    @abstractmethod
    def embed(self, faces: Sequence[np.ndarray]) -> np.ndarray:
        """L2-normalised float32 [B, D] of B faces that `cut` found."""


class FaceJudge(IdentityJudge):
    """A judge of photographs: its network sees the largest face that the detector finds."""

    def __init__(self, detector: FaceDetector):
        self.detector = detector

    def cut(self, image: Image.Image) -> Cut:
        faces = self.detector.find(image)
        return Cut(self.cut_face(image, faces[0]) if faces else None, len(faces))

    def cut_face(self, image: Image.Image, face: Face) -> np.ndarray:
        return align_face(image, face.points)


class OnnxJudge(FaceJudge):
    """A network of one input [B or 1, 3, 112, 112] and one output [., D]."""

    def __init__(self, path: Path, detector: FaceDetector):
        super().__init__(detector)
        self._session: Any = open_session(path)
        (self._input,), outputs = self._session.get_inputs(), self._session.get_outputs()
        if list(self._input.shape[1:]) != [3, SIDE, SIDE] or len(outputs) != 1:
            raise ModelError(f"{path} reads {list(self._input.shape)}, expected [., 3, {SIDE}, {SIDE}]: these are not "
                             f"weights of {self.name}")
        self._reads_one = self._input.shape[0] == 1

    def embed(self, faces: Sequence[np.ndarray]) -> np.ndarray:
        pixels = self.scale(np.stack(faces).astype(np.float32)).transpose(0, 3, 1, 2)
        parts = [pixels[row:row + 1] for row in range(len(pixels))] if self._reads_one else [pixels]
        read = [self._session.run(None, {self._input.name: np.ascontiguousarray(part)})[0] for part in parts]
        return normalise(np.concatenate(read))

    def scale(self, pixels: np.ndarray) -> np.ndarray:
        """Faces, float32 [B, 112, 112, 3] in 0..255, RGB, as the graph takes them."""
        return pixels


class SFace(OnnxJudge):
    """SFace (arXiv:2205.12010) of OpenCV Zoo."""

    name = "sface"


class ArcFace(OnnxJudge):
    """ArcFace (arXiv:1801.07698) as insightface publishes it."""

    name = "arcface"

    def __init__(self, path: Path, detector: FaceDetector):
        super().__init__(path, detector)
        self._scales = first_operations(path.read_bytes(), len(SCALED_INSIDE)) != SCALED_INSIDE

    def scale(self, pixels: np.ndarray) -> np.ndarray:
        return (pixels - 127.5) / 127.5 if self._scales else pixels


class VggFace(FaceJudge):
    """FaceNet (arXiv:1503.03832) trained on VGGFace2, facenet-pytorch's weights; `logits.*` of its training is unused.
    """

    name = "vggface"

    def __init__(self, path: Path, detector: FaceDetector):
        super().__init__(detector)
        state = {name: tensor for name, tensor in read_tensors(path).items() if not name.startswith("logits.")}
        self._network = InceptionResnet()
        given, expected = ({name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}
                           for shapes in ({name: tuple(tensor.shape) for name, tensor in state.items()},
                                          shapes_of(self._network)))
        compare_shapes(path, "Inception-ResNet-v1", given, expected)
        check_finite(path, {"vggface": state})
        self._network.load_state_dict(state, strict=False)  # older savers leave out how many batches were seen
        self._network.eval().requires_grad_(False)

    def cut_face(self, image: Image.Image, face: Face) -> np.ndarray:
        return crop_box(image, face.box, VGGFACE_SIDE)

    @torch.no_grad()
    def embed(self, faces: Sequence[np.ndarray]) -> np.ndarray:
        pixels = (torch.from_numpy(np.stack(faces)).float() - 127.5) / 128
        return self._network(pixels.permute(0, 3, 1, 2)).numpy()


def normalise(vectors: np.ndarray) -> np.ndarray:
    """float32 [B, D] of length 1."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def embed_concept(judge: IdentityJudge, images: Sequence[Image.Image], name: str) -> np.ndarray:
    """float32 [D]: mean of the embeddings of a person's images, of length 1; ModelError for an image without a face."""
    cuts = [judge.cut(image).face for image in images]
    faces = [face for face in cuts if face is not None]
    if len(faces) < len(images):
        raise ModelError(f"judge {judge.name} finds no face in {len(images) - len(faces)} of {len(images)} images of "
                         f"the concept {name}: replace them")
    return normalise(judge.embed(faces).mean(axis=0, keepdims=True))[0]


def identity_fingerprint(name: str, files: Sequence[Path], version: int) -> str:
    """sha256 (64 hex digits) of what decides an embedding: the files' contents, and our own preparation."""
    return content_hash({"judge": name, "version": version, "files": [fingerprint_path(file) for file in files]},
                        length=64)
