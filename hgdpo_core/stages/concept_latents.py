"""The user's images of people for InstantBooth: latents as for fine-tuning, and beside each the face as its concept.

An image that does not show exactly one face is rejected with the reason, and so is a caption without the concept's
word: which person would the word be?
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Self

from PIL import Image

from hgdpo_core.config.base import content_hash
from hgdpo_core.config.concepts import CROP
from hgdpo_core.errors import InputError
from hgdpo_core.image_sets.sets import ImageSet
from hgdpo_core.models import Model
from hgdpo_core.models.locations import Location, refuse_other_model
from hgdpo_core.models.tokenizers import word_reader
from hgdpo_core.prompts.concepts import FindFaces, crop_face
from hgdpo_core.scorers.identity import detector_fingerprint, face_finder
from hgdpo_core.stages.encoding import latent_settings
from hgdpo_core.stages.image_latents import ImageLatentStage, ReadConcept, find_skipped
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

SMALLEST_CONCEPT, LARGEST_CONCEPT = 32, 448
"""Pixels per side: smaller ones hold no likeness, larger ones are halved by every image encoder."""


def concept_latent_folder(store: Store, images: ImageSet, model: Model, size: tuple[int, int],
                          detector: str, word: str, crop: float = CROP) -> ShardFolder:
    """The folder of an image set's latents and concepts; `detector` names what finds faces, by its fingerprint,
    `word` stands before the person in every caption, `crop` is the concept's side in sides of the face's box."""
    settings = {**latent_settings("concept_latents", model, size), "images_id": images.id, "detector": detector,
                "crop": crop, "word": word, **model.encoding()}
    return ShardFolder.create(store, f"latents/concepts-{images.id}/{content_hash(settings)}", settings)


@dataclass(frozen=True)
class ConceptLatentStage(ImageLatentStage):
    """Latents, text embeddings and concepts of captioned images with one face each."""

    name, doing = "concept_latents", "encoding images of people"

    title: str = "latents of people"
    detector: Path | None = field(default=None, kw_only=True)
    """Weights of what finds faces; None for drawn ones."""

    @property
    def read_concept(self) -> ReadConcept:
        find, word, crop = face_finder(self.detector), self.folder.config["word"], self.folder.config["crop"]
        reads = word_reader(self.model.configs or self.model.path, "plain", word)

        def read(image: Image.Image, caption: str) -> bytes:
            refuse_caption(caption, word, reads)
            return cut_face(image, find, crop)

        return read

    def recipe(self, *, copy_to_store: bool = False) -> dict[str, Any]:
        found = self.detector and Location.of(self.folder.store, self.detector, copy_to_store=copy_to_store)
        return {**super().recipe(copy_to_store=copy_to_store), "detector": found and found.model_dump()}

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        found = recipe["detector"] and Location.model_validate(recipe["detector"]).locate(folder.store)
        detector = Path(found) if found else None
        refuse_other_model("face detector", detector_fingerprint(detector), folder.config["detector"])
        return replace(super().open(folder, recipe, indices), detector=detector)

    def counts(self) -> "PeopleCounts":
        """How many images can be trained on, and how many are refused, by reason; when all shards are made."""
        used = sum(manifest.rows for manifest in self.existing().values())
        return PeopleCounts(len(self.images), used, find_skipped(self.folder, len(self.images)).kinds)


class PeopleCounts(NamedTuple):
    """`images` is `used` and all of `refused` together."""

    images: int
    used: int
    refused: dict[str, int]


def has_word(caption: str, word: str) -> bool:
    """Whether a caption has the concept's word, alone."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption) is not None


def refuse_caption(caption: str, word: str, reads: Callable[[str], bool]) -> None:
    """InputError for a caption without the word, alone, or with it behind what the text encoder `reads`."""
    if not has_word(caption, word):
        raise InputError(f"its caption has no word {word}: expected it before the person")
    if not reads(caption):
        raise InputError(f"its caption has the word {word} behind what the text encoder reads: move it to the front")


def cut_face(image: Image.Image, find_faces: FindFaces, crop: float = CROP) -> bytes:
    """PNG of the square around the only face of an image; InputError where there is none, several, or a tiny one."""
    boxes = find_faces(image)
    if not boxes:
        raise InputError("it shows no face: expected exactly one")
    if len(boxes) > 1:
        raise InputError(f"it shows several faces: expected exactly one, not {len(boxes)}")
    face = crop_face(image, boxes[0], crop)
    if min(face.size) < SMALLEST_CONCEPT:
        raise InputError(f"its face is too small: {face.width} pixels wide with its surroundings, expected at least "
                         f"{SMALLEST_CONCEPT}")
    face.thumbnail((LARGEST_CONCEPT, LARGEST_CONCEPT))
    file = BytesIO()
    face.convert("RGB").save(file, "PNG")
    return file.getvalue()
