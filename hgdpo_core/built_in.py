"""What comes with the package under one source name: a target, two scorers, prompts and captioned images; and under
another a second target, whose images stand in for those of public preference data sets.

The only file outside `figures/` and the preset that resolves the names.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hgdpo_core.errors import InputError

if TYPE_CHECKING:
    from hgdpo_core.storage import Store

SOURCE = "figures"
FOREIGN_SOURCE = "figures-foreign"
"""A target that shares the built-in one's VAE, and its prompts, of which some name no person: stand-ins for the
generators and prompts of public preference data sets."""
SPLITS = ("train", "validation", "test")
SFT_IMAGES = 512
PEOPLE_IMAGES = 2048
"""Images that an adapter of the built-in target is trained on."""
PEOPLE, PROMPTS_PER_PERSON = 64, 8
"""Of Table 4."""
STRENGTH, TOKEN_STRENGTH = 1.0, 1.0
"""Of the built-in adapter, chosen on validation people (docs/EXPERIMENTS.md)."""
STAND_IN_PAIRS = 640
FOREIGN_GUIDANCE = 3.0
"""What the foreign generator is sampled with: it was evaluated so (weights/README.md)."""
DATA_SET = "figures setting"
SCORER_NOTE = ("the judge is the figures setting's own: a small model of PickScore's shape, trained on drawings. "
               "Nothing here says anything about photographs")


def is_built_in(source: str | None) -> bool:
    """Whether a setting names what comes with the package."""
    return source == SOURCE


def is_any_built_in(source: str | None) -> bool:
    """Whether the source of a target or of prompts is one of the two that come with the package."""
    return source in (SOURCE, FOREIGN_SOURCE)


def find_target(source: str) -> Path:
    """The diffusers folder of a built-in target."""
    from hgdpo_core import figures

    return {SOURCE: figures.target_path, FOREIGN_SOURCE: figures.foreign_path}[source]()


def shared_vae(source: str) -> str | None:
    """The source whose VAE a built-in target is completed by; None for a target that holds its own."""
    return SOURCE if source == FOREIGN_SOURCE else None


def find_vae() -> Path:
    """The diffusers folder of the built-in target's VAE."""
    return find_target(SOURCE) / "vae"


def find_scorer_weights(name: str) -> Path:
    """The folder of the built-in weights of "pickscore" or "inspector"."""
    from hgdpo_core import figures

    return {"pickscore": figures.judge_path, "inspector": figures.inspector_path}[name]()


def find_personaliser() -> Path:
    """The folder of the built-in target's InstantBooth adapter."""
    from hgdpo_core import figures

    return figures.personaliser_path()


def find_identity_judge() -> Path:
    """The folder of the built-in judge of identity."""
    from hgdpo_core import figures

    return figures.identity_path()


def concept_settings() -> dict[str, Any]:
    """Settings of a personalised comparison of the built-in target."""
    personaliser = {"source": SOURCE, "strength": STRENGTH, "token_strength": TOKEN_STRENGTH, "crop": None}
    return {"source": SOURCE, "personaliser": personaliser, "prompts_per_concept": PROMPTS_PER_PERSON, "judges": SOURCE}


def concept_prompts() -> tuple[str, ...]:
    """Prompts for the built-in people; `{person}` stands for each of them."""
    from hgdpo_core.figures import concepts

    return tuple(concepts.concept_prompts())


@contextmanager
def people_folder() -> Iterator[Path]:
    """Inside, a folder with an image of each of the built-in people, who no training has seen."""
    from hgdpo_core.figures.concepts import write_people

    with TemporaryDirectory() as folder:
        write_people(Path(folder), PEOPLE)
        yield Path(folder)


def source_of(path: Path) -> str | None:
    """The source under which a folder of the package's own models is found; None for any other folder."""
    from hgdpo_core import figures

    if path.resolve() == figures.foreign_path().resolve():
        return FOREIGN_SOURCE
    own = (figures.target_path, figures.judge_path, figures.inspector_path, figures.personaliser_path,
           figures.identity_path, find_vae)
    return SOURCE if path.resolve() in {folder().resolve() for folder in own} else None


def read_prompts(source: str, split: str, limit: int | None) -> tuple[str, ...]:
    """The first prompts of a split of a built-in source; InputError without a limit."""
    from hgdpo_core.figures import prompts
    from hgdpo_core.figures.foreign import foreign_prompts

    if limit is None:
        raise InputError(f'prompts from "{source}" need a limit: there are far more of them than a run can use')
    return tuple({SOURCE: prompts, FOREIGN_SOURCE: foreign_prompts}[source](split, limit, seed=0))


def find_images(store: "Store") -> Path:
    """The folder of captioned images, rendered once: beside the root's models, or in the cache.

    A store that writes nothing gets those of the root where they exist.
    """
    from hgdpo_core.figures.dataset import write_image_folder

    return _rendered(store, f"{SOURCE}-{SFT_IMAGES}", lambda folder: write_image_folder(folder, SFT_IMAGES, seed=0))


def find_people_images(store: "Store") -> Path:
    """The folder of images of people with concept prompts, for an adapter; kept as `find_images` keeps its own."""
    from hgdpo_core.figures.concepts import write_people_images

    return _rendered(store, f"{SOURCE}-people-{PEOPLE_IMAGES}",
                     lambda folder: write_people_images(folder, PEOPLE_IMAGES))


def _rendered(store: "Store", name: str, write: Callable[[Path], object]) -> Path:
    from hgdpo_core.storage import DryStore
    from hgdpo_core.storage.scratch import cache_folder

    folder = (store.local_path("images") or cache_folder()) / name
    if isinstance(store, DryStore) and not _is_complete(folder):
        folder = cache_folder(name)
    if not _is_complete(folder):
        write(folder)
    return folder


def _is_complete(folder: Path) -> bool:
    return (folder / "metadata.jsonl").exists()  # written last
