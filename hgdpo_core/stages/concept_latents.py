"""The user's images of people for InstantBooth: latents as for fine-tuning, and beside each the face as its concept.

An image that does not show exactly one face is rejected with the reason, and so is a caption without the concept's
word: which person would the word be?
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Self

from PIL import Image

from hgdpo_core.concepts import FindFaces, crop_face
from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import InputError
from hgdpo_core.image_sets import open_located_images
from hgdpo_core.image_sets.sets import ImageSet
from hgdpo_core.models import Model
from hgdpo_core.models.locations import find_located_model
from hgdpo_core.progress import count_of
from hgdpo_core.stages.encoding import latent_settings
from hgdpo_core.stages.image_latents import ImageLatentStage, ReadConcept
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

CROP = 2.2  # sides of the face's box, as `concepts.personaliser.crop`
SMALLEST_CONCEPT, LARGEST_CONCEPT = 32, 448
"""Pixels per side: smaller ones hold no likeness, larger ones are halved by every image encoder."""


def concept_latent_folder(store: Store, images: ImageSet, model: Model, size: tuple[int, int],
                          detector: str, word: str) -> ShardFolder:
    """The folder of an image set's latents and concepts; `detector` names what finds faces, by its fingerprint, and
    `word` stands before the person in every caption."""
    settings = {**latent_settings("concept_latents", model, size), "images_id": images.id, "detector": detector,
                "crop": CROP, "word": word, **model.encoding()}
    return ShardFolder.create(store, f"latents/concepts-{images.id}/{content_hash(settings)}", settings)


@dataclass(frozen=True)
class ConceptLatentStage(ImageLatentStage):
    """Latents, text embeddings and concepts of captioned images with one face each."""

    name, doing = "concept_latents", "encoding images of people"

    title: str = "latents of people"
    find_faces: FindFaces | None = field(default=None, kw_only=True)
    """By default the public detector."""

    @property
    def read_concept(self) -> ReadConcept:
        find = self.find_faces or _public_detector()
        return lambda image, caption: cut_face(image, caption, find, self.folder.config["word"])

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        store = folder.store
        return cls(open_located_images(store, recipe["images"], recipe["images_id"]), folder,
                   find_located_model(store, folder.config, recipe), requested=tuple(indices))


def _public_detector() -> FindFaces:
    from hgdpo_core.identity import face_finder, find_detector

    return face_finder(find_detector(None))


def cut_face(image: Image.Image, caption: str, find_faces: FindFaces, word: str) -> bytes:
    """PNG of the square around the only face of an image; InputError where there is none, several, or a tiny one, or
    where the caption lacks the word, alone."""
    if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption) is None:
        raise InputError(f"its caption has no word {word}: expected it before the person")
    boxes = find_faces(image)
    if len(boxes) != 1:
        raise InputError(f"it shows {'no face' if not boxes else count_of(len(boxes), 'face')}: expected exactly one")
    face = crop_face(image, boxes[0], CROP)
    if min(face.size) < SMALLEST_CONCEPT:
        raise InputError(f"its face is {face.width} pixels wide with its surroundings: expected at least "
                         f"{SMALLEST_CONCEPT}")
    face.thumbnail((LARGEST_CONCEPT, LARGEST_CONCEPT))
    file = BytesIO()
    face.convert("RGB").save(file, "PNG")
    return file.getvalue()
