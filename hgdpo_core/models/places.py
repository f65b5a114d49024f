"""Where a model lies, said so that another worker finds it: built in, on the hub, in the store, or on this disk."""

import tempfile
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from hgdpo_core import figures
from hgdpo_core.errors import ModelError
from hgdpo_core.fingerprints import fingerprint_path
from hgdpo_core.models.published import fetch_model, find_record, publish_model, stored_id
from hgdpo_core.storage import Store

FIGURES = "figures"
BUILT_IN = (figures.target_path, figures.judge_path, figures.inspector_path)


class Place(BaseModel):
    """Either `source` (figures, a hub id with its commit, or a path of this machine) or a model of the store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str | None = None
    revision: str | None = None
    model_id: str | None = None
    file: str | None = None
    """A single-file model's name inside `models/<model_id>/`."""

    @classmethod
    def of(cls, store: Store, path: Path, *, share: bool) -> Self:
        """The place of a local file or folder; with `share`, one from outside the store is copied into it first."""
        if path.resolve() in {built_in().resolve() for built_in in BUILT_IN}:
            return cls(source=FIGURES)
        inside = stored_id(store, path)
        if inside is not None:
            return cls(model_id=inside)
        if not share:
            return cls(source=str(path.resolve()))
        return cls(model_id=_copy_into_store(store, path), file=path.name if path.is_file() else None)

    def locate(self, store: Store) -> str:
        """What a TargetConfig or a scorer takes as `source` on this machine; a model of the store is fetched.

        ModelError when it is not there.
        """
        if self.model_id is not None:
            folder = fetch_model(store, self.model_id)
            if folder is None:
                raise ModelError(f"{store.url(f'models/{self.model_id}')} holds no model: expected the one that this "
                                 "work was planned with; start the run that planned it again")
            return str(folder / self.file if self.file else folder)
        assert self.source is not None
        if Path(self.source).is_absolute() and not Path(self.source).exists():
            raise ModelError(f"the model {self.source} is not on this machine: use a root that all workers reach, "
                             "such as s3://..., and start the run that planned this work again; it copies the model "
                             "there")
        return self.source


def _copy_into_store(store: Store, path: Path) -> str:
    fingerprint = fingerprint_path(path)
    name = "".join(c if c.isalnum() else "-" for c in path.stem)[:24].strip("-") or "model"
    model_id = f"{name}-{fingerprint[:12]}"
    if find_record(store, model_id) is not None:
        return model_id
    if path.is_dir():
        publish_model(store, model_id, path, {"kind": "copy"})
        return model_id
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        publish_model(store, model_id, Path(folder), {"kind": "copy"})
    return model_id
