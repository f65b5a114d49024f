"""What comes with the package under one source name: a target, two scorers, prompts and captioned images.

The only file outside `figures/` and the preset that resolves the name.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from hgdpo_core.errors import InputError

if TYPE_CHECKING:
    from hgdpo_core.storage import Store

SOURCE = "figures"
SPLITS = ("train", "validation", "test")
SFT_IMAGES = 512
DATA_SET = "figures setting"
SCORER_NOTE = ("the judge is the figures setting's own: a small model of PickScore's shape, trained on drawings. "
               "Nothing here says anything about photographs")


def is_built_in(source: str | None) -> bool:
    """Whether a setting names what comes with the package."""
    return source == SOURCE


def find_target() -> Path:
    """The diffusers folder of the target."""
    from hgdpo_core import figures

    return figures.target_path()


def find_scorer_weights(name: str) -> Path:
    """The folder of the built-in weights of "pickscore" or "inspector"."""
    from hgdpo_core import figures

    return {"pickscore": figures.judge_path, "inspector": figures.inspector_path}[name]()


def holds(path: Path) -> bool:
    """Whether a folder is one of the package's own models."""
    from hgdpo_core import figures

    own = (figures.target_path, figures.judge_path, figures.inspector_path)
    return path.resolve() in {folder().resolve() for folder in own}


def read_prompts(split: str, limit: int | None) -> tuple[str, ...]:
    """The first prompts of a split; InputError without a limit."""
    from hgdpo_core import figures

    if limit is None:
        raise InputError(f'prompts from "{SOURCE}" need a limit: there are far more of them than a run can use')
    return tuple(figures.prompts(split, limit, seed=0))


def find_images(store: "Store") -> Path:
    """The folder of captioned images, rendered once: beside the root's models, or in the cache.

    A store that writes nothing gets those of the root where they exist.
    """
    from hgdpo_core.figures.dataset import write_image_folder
    from hgdpo_core.storage import DryStore
    from hgdpo_core.storage.scratch import cache_folder

    name = f"{SOURCE}-{SFT_IMAGES}"
    folder = (store.local_path("images") or cache_folder()) / name
    if isinstance(store, DryStore) and not _is_complete(folder):
        folder = cache_folder(name)
    if not _is_complete(folder):
        write_image_folder(folder, SFT_IMAGES, seed=0)
    return folder


def _is_complete(folder: Path) -> bool:
    return (folder / "metadata.jsonl").exists()  # written last
