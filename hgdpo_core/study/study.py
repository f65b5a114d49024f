"""A study of the store: its settings and its pairs, without their images."""

import hashlib
import shlex
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq

from hgdpo_core.config.base import content_hash, validate
from hgdpo_core.config.study import StudyConfig
from hgdpo_core.errors import InputError
from hgdpo_core.images import decode_image, encode_image
from hgdpo_core.progress import count_of
from hgdpo_core.storage import Store
from hgdpo_core.storage.local import write_atomically
from hgdpo_core.storage.scratch import cache_folder
from hgdpo_core.storage.shards import read_table
from hgdpo_core.study.plan import Trial, count_people, count_trials, plan_trials
from hgdpo_core.study.votes import STUDIES

PAIRS_NAME, CONFIG_NAME = "pairs.parquet", "config.json"
SECONDS_PER_QUESTION = 6.0  # a guess that the page and the command name as such
Picture = Literal["first", "second"]


@dataclass(frozen=True)
class StudyPair:
    """A pair without its images."""

    pair: str
    prompt_id: str
    prompt: str
    first: str
    second: str
    """Names of the models."""

    def sides(self, trial: Trial) -> tuple[str, str]:
        """What is on the left and on the right: names of models; of a check, "picture" and "noise"."""
        names = ("picture", "noise") if trial.kind == "check" else (self.first, self.second)
        return (names[1], names[0]) if trial.swapped else names


@dataclass(frozen=True)
class Study:
    """An existing study. `pairs` are in the order of their numbers."""

    store: Store
    id: str
    config: StudyConfig
    pairs: tuple[StudyPair, ...]

    @property
    def key(self) -> str:
        return f"{STUDIES}/{self.id}"

    @property
    def models(self) -> list[str]:
        """Names of the models that are compared, sorted."""
        return sorted({name for pair in self.pairs for name in (pair.first, pair.second)})

    @cached_property
    def people(self) -> int:
        """Participants that it takes until each pair is seen by as many people as requested."""
        return count_people(len(self.pairs), self.config)

    @cached_property
    def trials_each(self) -> int:
        """Questions to each participant."""
        return count_trials(len(self.pairs), self.config)

    @property
    def minutes_each(self) -> int:
        """About how long one participant takes."""
        return max(1, round(self.trials_each * SECONDS_PER_QUESTION / 60))

    @property
    def serve_command(self) -> str:
        """What asks people."""
        return serve_command(self.id, self.store.root)

    def trials(self, number: int) -> list[Trial]:
        """What participant `number` sees."""
        return plan_trials(len(self.pairs), self.config, number)


def serve_command(study: str, root: str) -> str:
    """The command that asks people the questions of a study."""
    return f"hgdpo study serve {study} --root {shlex.quote(root)}"


def open_study(store: Store, name: str | None = None) -> Study:
    """A study by its id or key, or the root's only one; InputError for any other."""
    there = [study for study in store.list_folders(STUDIES) if store.exists(f"{STUDIES}/{study}/{CONFIG_NAME}")]
    named = f"it has {', '.join(there) or 'none yet'}; make one with hgdpo study create"
    if name is None and len(there) != 1:
        raise InputError(f"{store.root} holds {count_of(len(there), 'study', 'studies')}, expected one where none is "
                         f"named: {named}")
    study_id = there[0] if name is None else name.strip("/").removeprefix(f"{STUDIES}/")
    if study_id not in there:
        raise InputError(f"{name} is not a study in {store.root}: {named}")
    record = store.read_object(f"{STUDIES}/{study_id}/{CONFIG_NAME}", config=dict)
    columns = ["pair", "prompt_id", "prompt", "first", "second"]
    table = read_table(store, f"{STUDIES}/{study_id}/{PAIRS_NAME}", columns)
    return Study(store, study_id, validate(StudyConfig, record["config"]),
                 tuple(StudyPair(**row) for row in table.to_pylist()))


def log_folder(study: Study) -> Path:
    """Where the server's log of votes is kept: beside a study in a local root, else in this user's cache."""
    local = study.store.local_path(f"{study.key}/log")
    return local or cache_folder("studies") / content_hash({"root": study.store.root}) / study.id


# -- images


@dataclass(frozen=True)
class StudyImages:
    """A study's images as files of a local folder, so that a server holds none of them in memory."""

    folder: Path

    @classmethod
    def unpack(cls, study: Study, folder: Path) -> "StudyImages":
        """Write all images of a study into a folder, a few at a time."""
        images = cls(folder)
        with study.store.open(f"{study.key}/{PAIRS_NAME}") as file:
            columns = ["pair", "first_image", "second_image"]
            for batch in pq.ParquetFile(file).iter_batches(batch_size=8, columns=columns):
                for row in batch.to_pylist():
                    images.path(row["pair"], "first").write_bytes(row["first_image"])
                    images.path(row["pair"], "second").write_bytes(row["second_image"])
        return images

    def path(self, pair: str, picture: Picture, *, noise: bool = False) -> Path:
        """The file of an image, or of its noise."""
        return self.folder / f"{pair}-{picture}{'-noise' if noise else ''}.webp"

    def read(self, pair: str, trial: Trial, side: Literal["left", "right"]) -> bytes:
        """The encoded image of one side of a trial; the noise of a picture is made when it is first shown."""
        is_second = (side == "left") == trial.swapped
        if trial.picture is None:
            return self.path(pair, "second" if is_second else "first").read_bytes()
        path = self.path(pair, trial.picture, noise=is_second)
        if is_second and not path.exists():
            noise = make_noise(self.path(pair, trial.picture).read_bytes())
            write_atomically(path, lambda file: file.write(noise))  # others may read it at this moment
        return path.read_bytes()


def encode_alike(pixels: Iterable[np.ndarray]) -> list[bytes]:
    """Images, uint8 [H, W, 3], as lossless WebP: nothing of their files but pixels stays."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda image: encode_image(image, "webp"), pixels))


def make_noise(data: bytes) -> bytes:
    """An image's pixels in random order: the same colours, and nothing to see."""
    pixels = np.asarray(decode_image(data))
    order = np.random.default_rng(int.from_bytes(hashlib.sha256(data).digest()[:8])).permutation(pixels.size // 3)
    return encode_image(pixels.reshape(-1, 3)[order].reshape(pixels.shape), "webp")
