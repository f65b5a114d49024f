"""Judges of identity: how far the person of a generated image is from the one of a concept.

Beside the scorers, not among them: a judge compares an image with another image, and reads no prompt. `detector.py`
finds faces, `alignment.py` cuts them out, `judges.py` embeds them. `JUDGES` holds where weights come from.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hgdpo_core.built_in import SOURCE, find_identity_judge, is_built_in
from hgdpo_core.config import JudgeConfig
from hgdpo_core.errors import ModelError
from hgdpo_core.figures import faces
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.prompts.concepts import Box, FindFaces
from hgdpo_core.scorers.identity.detector import FaceDetector
from hgdpo_core.scorers.identity.figures import FiguresJudge
from hgdpo_core.scorers.identity.judges import (
    ArcFace,
    Cut,
    IdentityJudge,
    SFace,
    VggFace,
    embed_concept,
    identity_fingerprint,
)
from hgdpo_core.scorers.identity.sessions import require_onnxruntime
from hgdpo_core.scorers.weights import find_weights

DETECTOR, DETECTOR_REPOSITORY = "face_detection_yunet_2023mar.onnx", "opencv/face_detection_yunet"
DETECTOR_TITLE = "YuNet of OpenCV Zoo (MIT)"
FORMAT_VERSION = 1  # raise when the same weights would give other distances


@dataclass(frozen=True)
class JudgeSource:
    """An entry of `JUDGES`: a judge's name for people, its weights, and how it is loaded."""

    title: str
    provenance: str
    """Where its weights are from, and their licence: part of every report that uses it."""
    names: tuple[str, ...]
    repository: str | None
    """On the hub; None where users bring the weights."""
    load: Callable[[Path, Path], IdentityJudge]
    """From its weights and the detector's."""
    finds_faces: bool = True
    """Whether it needs the detector; else its `load` is given its own weights twice."""

    built_in: bool = False
    """Whether its weights come with the package, and no others are read."""

    def find(self, source: str | None) -> Path:
        """The weights; ModelError, in one line, where they are not there."""
        if self.built_in:
            return find_identity_judge()
        if source is None and self.repository is None:
            raise ModelError(f"{self.title} has no weights that we may fetch: get {self.names[0]} ({self.provenance}) "
                             f"and name it as concepts.judges=...={self.names[0]}")
        return find_weights(source, self.names, self.repository or self.title, "the judge's source")


JUDGES: dict[str, JudgeSource] = {
    "sface": JudgeSource("SFace", "SFace of OpenCV Zoo, Apache-2.0", ("face_recognition_sface_2021dec.onnx",),
                         "opencv/face_recognition_sface", lambda path, detector: SFace(path, load_detector(detector))),
    "arcface": JudgeSource("ArcFace", "insightface's buffalo_l, for non-commercial research only", ("w600k_r50.onnx",),
                           None, lambda path, detector: ArcFace(path, load_detector(detector))),
    "vggface": JudgeSource("VGGFace", "facenet-pytorch v2.2.9, MIT, trained on VGGFace2, whose images are for research",
                           ("20180402-114759-vggface2.safetensors", "20180402-114759-vggface2.pt"), None,
                           lambda path, detector: VggFace(path, load_detector(detector))),
    SOURCE: JudgeSource("Identity judge of the figures setting", "in the package, trained on drawings", (), None,
                           lambda path, _: FiguresJudge(path), finds_faces=False, built_in=True)}


def judge_title(name: str) -> str:
    """What reports call a judge."""
    return JUDGES[name].title if name in JUDGES else name


def find_detector(source: str | None) -> Path | None:
    """The face detector's weights: a file, a folder that holds them, or the public ones; None for drawn faces.

    ModelError if none is there; ConfigError where onnxruntime, which runs it, is not installed.
    """
    if is_built_in(source):
        return None
    require_onnxruntime()
    return find_weights(source, (DETECTOR,), DETECTOR_REPOSITORY, "concepts.detector")


@functools.lru_cache(maxsize=2)
def load_detector(path: Path) -> FaceDetector:
    """The detector, once per process: all judges share it."""
    return FaceDetector(path)


def detector_fingerprint(detector: Path | None) -> str:
    """What stands in ids for a detector of `find_detector`."""
    return faces.VERSION if detector is None else fingerprint_path(detector)


def face_finder(path: Path | None) -> FindFaces:
    """Boxes of an image's faces, the largest first, by the detector in this file; of drawn faces for None."""
    if path is None:
        return faces.find_faces

    def find(image: object) -> Sequence[Box]:
        return [face.box for face in load_detector(path).find(image)]  # pyright: ignore[reportArgumentType]

    return find


def needs_detector(judges: Sequence[JudgeConfig]) -> bool:
    """Whether one of the judges finds faces first."""
    return any(_source(judge).finds_faces for judge in judges)


def locate_judge(judge: JudgeConfig) -> Path:
    """A judge's weights; ModelError where they are not there."""
    return _source(judge).find(judge.source)


def find_judge(judge: JudgeConfig, detector: Path | None) -> str:
    """A judge's fingerprint, without loading it; ModelError where its weights are not there."""
    files = [locate_judge(judge), *([detector] if detector and _source(judge).finds_faces else [])]
    return identity_fingerprint(judge.name, files, FORMAT_VERSION)


def load_judge(judge: JudgeConfig, detector: Path | None) -> IdentityJudge:
    """The judge that the settings name; `detector` may be None for one that finds no faces."""
    weights = locate_judge(judge)
    return _source(judge).load(weights, detector or weights)


def _source(judge: JudgeConfig) -> JudgeSource:
    if judge.name not in JUDGES:
        raise ModelError(f"there is no judge of identity {judge.name!r}; there are {', '.join(JUDGES)}")
    return JUDGES[judge.name]


__all__ = ["DETECTOR", "JUDGES", "Cut", "IdentityJudge", "JudgeSource", "detector_fingerprint", "embed_concept",
           "face_finder", "find_detector", "find_judge", "judge_title", "load_detector", "load_judge", "locate_judge",
           "needs_detector"]
