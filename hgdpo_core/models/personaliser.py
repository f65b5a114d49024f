"""The seam between the method and a personalised model: images of a person as a condition beside the prompt.

A personaliser is an adapter of a loaded target. It reads a concept, a person's images, once; a sample's concept then
travels in its `Conditioning`, row by row, so that one batch holds several people (arXiv:2405.20216v1, Section 5.4).
`PERSONALISERS` holds one entry per kind; `load_personaliser` finds the kind from the adapter's files.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from huggingface_hub import snapshot_download
from PIL import Image

from hgdpo_core.built_in import find_personaliser, is_built_in
from hgdpo_core.config import PersonaliserConfig, PromptSyntax
from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import ModelError
from hgdpo_core.models.backbone import Backbone, Conditioning, TextConditioner
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.models.hub import find_or_download
from hgdpo_core.prompts import Sample

if TYPE_CHECKING:
    from hgdpo_core.models.model import Model

ENCODER = "image_encoder"
"""The folder beside an adapter's file."""
ConceptEmbedding = Mapping[str, torch.Tensor]
"""What a personaliser keeps of a concept: tensors by name, each with a first dimension of 1, the row's."""


class Personaliser(ABC):
    """An adapter, loaded for one backbone."""

    name: ClassVar[str]

    @abstractmethod
    def attach(self, backbone: Backbone) -> Backbone:
        """The backbone with the adapter in its network; its LoRA, if it has one, is merged already.

        The returned denoiser reads what `conditioned` and `unconditioned` put into a conditioning.
        """

    @abstractmethod
    def encode(self, images: Sequence[Image.Image]) -> ConceptEmbedding:
        """One concept from its images, cut to the face by the caller; called once per concept, after `attach`."""

    @abstractmethod
    def conditioned(self, text: TextConditioner, prompts: Sequence[str],
                    concepts: Sequence[ConceptEmbedding]) -> list[Conditioning]:
        """One conditioning of one text per prompt, each with its concept; prompts as a user writes them."""

    @abstractmethod
    def unconditioned(self, negative: Conditioning) -> Conditioning:
        """The negative prompt's conditioning, of one row, without a concept: guidance's other branch."""


class PersonaliserKind(Protocol):
    """An entry of `PERSONALISERS`: a module or an object that checks an adapter's files and loads it."""

    default_strength: float
    """Where the settings name none."""

    def recognises(self, path: Path) -> bool:
        """Whether a file or a folder is an adapter of this kind, by names and configs alone."""
        ...

    def check(self, adapter: "Adapter", model: "Model") -> None:
        """ModelError, in one line, where headers and configs show that it is broken or for another model."""
        ...

    def check_prompts(self, adapter: "Adapter", model: "Model", prompts: Sequence[str]) -> None:
        """InputError, in one line, for prompts in which the adapter finds no place for a person."""
        ...

    def load(self, adapter: "Adapter") -> Personaliser:
        """The adapter; `attach` moves it to the backbone's device and precision."""
        ...


PERSONALISERS: dict[str, PersonaliserKind] = {}
"""By name; `models/__init__.py` enters ours."""


@dataclass(frozen=True)
class Adapter:
    """A personaliser's files and settings. Cheap; holds no tensors."""

    name: str
    """Its kind, a key of `PERSONALISERS`."""
    path: Path
    image_encoder: Path | None
    config: PersonaliserConfig
    fingerprint: str

    def identity(self) -> dict[str, Any]:
        """What decides the images that are generated with it."""
        settings = self.config.identity()
        del settings["source"], settings["image_encoder"]
        return {**settings, "name": self.name, "fingerprint": self.fingerprint, "strength": self.strength}

    @property
    def strength(self) -> float:
        """How much it changes images, by the settings or by default."""
        given = self.config.strength
        return PERSONALISERS[self.name].default_strength if given is None else given


def find_adapter(config: PersonaliserConfig, model: "Model") -> Adapter:
    """The adapter that the settings name, checked against the model; ModelError, in one line, if it cannot be used."""
    path = find_personaliser() if is_built_in(config.source) else _find_path(config)
    name = next((name for name, kind in PERSONALISERS.items() if kind.recognises(path)), None)
    if name is None:
        raise ModelError(f"{path} is no personaliser: expected an IP-Adapter as a .safetensors file "
                         f"(image_proj.*, ip_adapter.*), or a folder that was trained here; known: "
                         f"{', '.join(PERSONALISERS)}")
    encoder = _find_encoder(config, path)
    prints = [fingerprint_path(each) for each in (path, encoder) if each is not None]
    adapter = Adapter(name, path, encoder, config, content_hash(prints, length=64))
    PERSONALISERS[name].check(adapter, model)
    return adapter


def _find_path(config: PersonaliserConfig) -> Path:
    """A file or folder of this machine, else a file in the cache of the hub, downloaded with its image encoder."""
    name, encoder = (str(PurePosixPath(config.subfolder, part)) for part in (config.weight_name, ENCODER))
    patterns = [name, f"{encoder}/*.json", f"{encoder}/*.safetensors"]
    download = partial(snapshot_download, config.source, revision=config.revision, allow_patterns=patterns)
    path = find_or_download("the personaliser", config.source, download, "an IP-Adapter for SD 1.5 as a .safetensors "
                            "file, a folder that was trained here, or a hub id such as h94/IP-Adapter")
    if Path(config.source).expanduser().exists():
        return path
    if not (path / name).is_file():
        raise ModelError(f"the personaliser {config.source} has no {name}: set concepts.personaliser.subfolder and "
                         "weight_name to a file of that repository, with a network where the cache lacks it")
    return path / name


def _find_encoder(config: PersonaliserConfig, path: Path) -> Path | None:
    """The image encoder that is named, else the one beside an adapter's file; None for one that brings its own."""
    if config.image_encoder is None:
        beside = path.parent / ENCODER
        return beside if path.is_file() and beside.is_dir() else None
    encoder = Path(config.image_encoder).expanduser()
    if not encoder.is_dir():
        raise ModelError(f"personaliser.image_encoder {config.image_encoder} is no folder: expected config.json and "
                         "model.safetensors of a CLIP image encoder with projection")
    return encoder


def personalise(backbone: Backbone, adapter: Adapter) -> Backbone:
    """A loaded backbone with an adapter: its prompts are `Sample`s whose concepts `PersonalText.learn` was given."""
    personaliser = PERSONALISERS[adapter.name].load(adapter)
    attached = personaliser.attach(backbone)
    return replace(attached, text=PersonalText(attached.text, personaliser, {}))


class PersonalText:
    """A text conditioner whose prompts are samples: each conditioning holds its concept too."""

    def __init__(self, text: TextConditioner, personaliser: Personaliser, concepts: dict[str, ConceptEmbedding]):
        self.text, self.personaliser, self.concepts = text, personaliser, concepts
        self.chunk_length, self.width = text.chunk_length, text.width

    def learn(self, concept_id: str, images: Sequence[Image.Image]) -> None:
        """Encode a concept, unless it was before; its images are cut to the face already."""
        if concept_id not in self.concepts:
            self.concepts[concept_id] = self.personaliser.encode(images)

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """As `TextConditioner.encode`; ModelError for a prompt without a concept, or with one that is not known."""
        return self.personaliser.conditioned(self.text, prompts, list(self._concepts(prompts)))

    def _concepts(self, prompts: Sequence[str]) -> Iterator[ConceptEmbedding]:
        for prompt in prompts:
            concept = prompt.concept if isinstance(prompt, Sample) else None
            if concept is None or concept not in self.concepts:
                raise ModelError(f"the personalised model was given {str(prompt)!r:.80} with "
                                 f"{'no concept' if concept is None else f'the unknown concept {concept}'}: expected a "
                                 "sample whose concept it has learnt")
            yield self.concepts[concept]

    def negative(self, length: int) -> Conditioning:
        return self.personaliser.unconditioned(self.text.negative(length))

    def encode_captions(self, captions: Sequence[str]) -> Conditioning:
        return self.text.encode_captions(captions)

    def count_cut(self, captions: Sequence[str]) -> int:
        return self.text.count_cut(captions)

    def reading(self, syntax: PromptSyntax) -> "PersonalText":
        return PersonalText(self.text.reading(syntax), self.personaliser, self.concepts)
