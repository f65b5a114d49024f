"""Concepts: people, each by one image or several, that a personalised model is conditioned on.

`read_concepts` reads a folder: each image file is a person, and each subfolder is one with several images. A text
beside it, `NAME.txt`, says what prompts call the person, in a first line ("a woman"), and may describe in a second what
scorers should find ("a woman with red hair"): both take the place of `{person}` in prompts. In the store a concept is
`concepts/<id>/`: its images as they were, and `concept.json` with its name and faces.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from hgdpo_core.errors import InputError, StorageError
from hgdpo_core.images import IMAGE_SUFFIXES, decode_image
from hgdpo_core.progress import count_of
from hgdpo_core.prompts.samples import PERSON, Sample
from hgdpo_core.storage import Store
from hgdpo_core.storage.text_files import decode_text

Box = tuple[float, float, float, float]
"""A face: left, top, width and height in pixels of the image as `decode_image` turns it."""
FindFaces = Callable[[Image.Image], Sequence[Box]]
"""Boxes of the faces of an image, the largest first."""


@dataclass(frozen=True)
class Concept:
    """One person: encoded images, and the largest face of each where faces were looked for."""

    name: str
    """Of the file or folder, without a suffix; for people to read."""
    images: tuple[bytes, ...]
    faces: tuple[Box, ...] = ()
    called: str = "a person"
    description: str | None = None
    """For scorers; None where they read what the model reads."""

    @cached_property
    def id(self) -> str:
        """First 16 hex digits of the sha256 of the images' bytes in their order."""
        return hashlib.sha256(b"".join(self.images)).hexdigest()[:16]

    def sample(self, prompt: str) -> Sample:
        """A prompt for this person."""
        caption = prompt.replace(PERSON, self.description) if self.description and PERSON in prompt else None
        return Sample(prompt.replace(PERSON, self.called), self.id, caption)

    def pictures(self) -> list[Image.Image]:
        """The images, decoded."""
        return [decode_image(data) for data in self.images]

    def crops(self, factor: float | None) -> list[Image.Image]:
        """Of each image the square around the face whose side is `factor` times the face's; whole images for None."""
        if factor is None:
            return self.pictures()
        return [crop_face(image, box, factor) for image, box in zip(self.pictures(), self.faces, strict=True)]


def crop_face(image: Image.Image, box: Box, factor: float) -> Image.Image:
    """The square around a face, `factor` times its longer side wide; where the image ends it is moved, then smaller."""
    left, top, width, height = box
    side = min(factor * max(width, height), *image.size)
    corner = [min(max(start + length / 2 - side / 2, 0), limit - side)
              for start, length, limit in zip((left, top), (width, height), image.size, strict=True)]
    x, y, size = round(corner[0]), round(corner[1]), max(1, round(side))
    return image.crop((x, y, min(x + size, image.width), min(y + size, image.height)))


@dataclass(frozen=True)
class ConceptList:
    """The people of a folder, in the order of their names, and how many files there were no image."""

    concepts: tuple[Concept, ...]
    ignored: int = 0
    surplus: int = 0
    """Images beyond `images_per_concept`."""

    def describe(self) -> str:
        """One line: how many people and images, what was left out."""
        images = sum(len(concept.images) for concept in self.concepts)
        left = {"that are no images": self.ignored, "beyond images_per_concept": self.surplus}
        parts = [f"left out {count_of(count, 'file')} {why}" for why, count in left.items() if count]
        return "; ".join([f"{len(self.concepts)} people by {count_of(images, 'image')}", *parts])


def read_concepts(folder: str | Path, images_per_concept: int | None = None,
                  find_faces: FindFaces | None = None) -> ConceptList:
    """The people of a folder; InputError, in one line, where one of them cannot be used.

    With `find_faces` each image must show a face; of several the largest is the person.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InputError(f"{folder} is no folder of concepts: expected one image per person, or a folder per person")
    people = {path.name if path.is_dir() else path.stem: path for path in _visible(root)
              if path.is_dir() or _is_image(path)}
    files = {name: [f for f in _visible(path) if _is_image(f)] if path.is_dir() else [path]
             for name, path in sorted(people.items())}
    listed = sum(len(found) for found in files.values())
    entries = sum(len(_visible(path)) if path.is_dir() else 1 for path in _visible(root))
    if not listed or not all(files.values()):
        empty = next((people[name] for name, found in files.items() if not found), root)
        raise InputError(f"{empty} holds no image: expected files that end in {', '.join(IMAGE_SUFFIXES[:4])}, one per "
                         "person, or a folder of them per person")
    used = {name: found[:images_per_concept] for name, found in files.items()}
    _refuse_unequal(used)
    concepts = [Concept(name, tuple(path.read_bytes() for path in found), **_read_words(root / f"{name}.txt"))
                for name, found in used.items()]
    texts = sum((root / f"{name}.txt").is_file() for name in used)
    _refuse_unreadable(used, concepts)
    _refuse_twins(concepts)
    if find_faces is not None:
        concepts = _with_faces(used, concepts, find_faces)
    return ConceptList(tuple(concepts), ignored=entries - listed - texts,
                       surplus=listed - sum(len(found) for found in used.values()))


def _refuse_unequal(files: dict[str, list[Path]]) -> None:
    """An adapter reads one batch for several people, so it needs as many images of each."""
    fewest, most = (choose(files, key=lambda name: len(files[name])) for choose in (min, max))
    if len(files[fewest]) < len(files[most]):
        raise InputError(f"the concept {most} has {count_of(len(files[most]), 'image')}, {fewest} has "
                         f"{len(files[fewest])}: an adapter reads equally many of each; give as many, or set "
                         f"concepts.images_per_concept to {len(files[fewest])}")


def _read_words(path: Path) -> dict[str, Any]:
    """What a person is called and how they are described; {} without a text."""
    if not path.is_file():
        return {}
    lines = [line.strip() for line in decode_text(path.read_bytes(), str(path)).splitlines() if line.strip()]
    if not 1 <= len(lines) <= 2:
        raise InputError(f"{path} has {len(lines)} lines of text: expected what prompts call the person (a woman), and "
                         "at most one more that describes them for scorers")
    return dict(zip(("called", "description"), lines, strict=False))


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _refuse_unreadable(files: dict[str, list[Path]], concepts: Sequence[Concept]) -> None:
    broken: list[str] = []
    for concept in concepts:
        for path, data in zip(files[concept.name], concept.images, strict=True):
            try:
                decode_image(data)
            except InputError as error:
                broken.append(f"{path}: {error}")
    if broken:
        raise InputError(f"{count_of(len(broken), 'image')} of concepts cannot be read, the first is {broken[0]}; "
                         "replace or remove them")


def _refuse_twins(concepts: Sequence[Concept]) -> None:
    names: dict[str, str] = {}
    for concept in concepts:
        if (other := names.setdefault(concept.id, concept.name)) != concept.name:
            raise InputError(f"the concepts {other} and {concept.name} have the same images: remove one of them")


def _with_faces(files: dict[str, list[Path]], concepts: Sequence[Concept], find_faces: FindFaces) -> list[Concept]:
    found = {concept.name: [find_faces(image) for image in concept.pictures()] for concept in concepts}
    faceless = [path for name, faces in found.items() for path, boxes in zip(files[name], faces, strict=True)
                if not boxes]
    if faceless:
        raise InputError(f"{count_of(len(faceless), 'image')} of concepts show no face, the first is {faceless[0]}: "
                         "replace or remove them; a face should be upright and at least 40 pixels wide")
    return [replace(concept, faces=tuple(boxes[0] for boxes in found[concept.name])) for concept in concepts]


# -- in the store


def save_concept(store: Store, concept: Concept) -> None:
    """Write `concepts/<id>/`; the description is last, so that a concept is whole once it is there."""
    for number, data in enumerate(concept.images):
        store.write_bytes(f"concepts/{concept.id}/image-{number:03d}", data)
    store.write_json(f"concepts/{concept.id}/concept.json", {
        "name": concept.name, "images": len(concept.images), "faces": [list(box) for box in concept.faces]})


def load_concept(store: Store, concept_id: str) -> Concept:
    """The concept that `save_concept` wrote; StorageError where its images are not those of its id."""
    record: dict[str, Any] = store.read_object(f"concepts/{concept_id}/concept.json", name=str, images=int,
                                               faces=list[list[float]])
    images = tuple(store.read_bytes(f"concepts/{concept_id}/image-{number:03d}") for number in range(record["images"]))
    faces = [(left, top, width, height) for left, top, width, height in record["faces"]]
    concept = Concept(record["name"], images, tuple(faces))
    if concept.id != concept_id:
        raise StorageError(f"{store.url(f'concepts/{concept_id}')} holds other images than those of its id: start the "
                           "run that planned this work again with the same concepts")
    return concept
