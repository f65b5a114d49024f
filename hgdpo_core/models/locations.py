"""Locations of models as other workers find them: built in, on the hub, in the store, or on this disk."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from hgdpo_core import built_in
from hgdpo_core.config import PersonaliserConfig, TargetConfig
from hgdpo_core.errors import ModelError
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.models.model import Lora, Model, find_model, recorded_syntax
from hgdpo_core.models.personaliser import Adapter, find_adapter
from hgdpo_core.models.published import fetch_model, find_record, publish_model, stored_id
from hgdpo_core.storage import Store


class Location(BaseModel):
    """Either `source` (built in, a hub id with its commit, or a path of this machine) or a model of the store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str | None = None
    revision: str | None = None
    model_id: str | None = None
    file: str | None = None
    """A single-file model's name inside `models/<model_id>/`."""

    @classmethod
    def of(cls, store: Store, path: Path, *, copy_to_store: bool) -> Self:
        """The location of a local file or folder; `copy_to_store` first copies one from outside the store into it."""
        if (known := built_in.source_of(path)) is not None:
            return cls(source=known)
        if (inside := stored_id(store, path)) is not None:
            return cls(model_id=inside)
        if not copy_to_store:
            # a file of the hub's cache is a link to one whose name says nothing
            return cls(source=str(path.parent.resolve() / path.name if path.is_file() else path.resolve()))
        return cls(model_id=_copy_into_store(store, path), file=path.name if path.is_file() else None)

    @classmethod
    def of_source(cls, store: Store, source: str | None, *, copy_to_store: bool) -> Self:
        """The location of a scorer's source: a path of this machine, or a name (hub id, built in) as it is."""
        path = Path(source).expanduser() if source not in (None, built_in.SOURCE) else None
        if path is None or not path.exists():
            return cls(source=source)
        return cls.of(store, path, copy_to_store=copy_to_store)

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
    with tempfile.TemporaryDirectory() as links:
        if path.is_file():
            (Path(links) / path.name).symlink_to(path.resolve())
        publish_model(store, model_id, path if path.is_dir() else Path(links), {"kind": "copy"})
    return model_id


def model_locations(store: Store, model: Model, *, copy_to_store: bool) -> dict[str, Any]:
    """Locations of the model, its LoRA, its VAE and its configs, for `find_located_model`; and if dtype was auto."""
    def locate(path: Path | None) -> dict[str, Any] | None:
        return Location.of(store, path, copy_to_store=copy_to_store).model_dump() if path else None

    on_hub = Location(source=model.hub_id, revision=model.fingerprint).model_dump() if model.hub_id else None
    package = Path(__file__).parent.resolve()  # such configs are on every worker
    shipped = model.configs is None or model.configs.resolve().parent == package
    planned: dict[str, Any] = {"auto_dtype": True} if model.auto_dtype else {}
    if model.prediction_type:  # the yaml beside a single file is not copied with it
        planned["prediction_type"] = model.prediction_type
    adapter = model.personaliser
    personal = {"personaliser": {"config": adapter.config.model_dump(mode="json"), "source": locate(adapter.path),
                                 "image_encoder": locate(adapter.image_encoder)}} if adapter else {}
    return {"model": on_hub or locate(model.path), "lora": locate(model.lora.path if model.lora else None),
            "vae": locate(model.vae), "configs": None if shipped else locate(model.configs), **planned, **personal}


def find_located_model(store: Store, identity: Mapping[str, Any], recipe: Mapping[str, Any]) -> Model:
    """The model of an identity (`Model.identity`) at its recorded location; ModelError when it is another one now."""
    location = Location.model_validate(recipe["model"])
    vae, configs = (Location.model_validate(recipe[name]).locate(store) if recipe.get(name) else None
                    for name in ("vae", "configs"))
    model = find_model(TargetConfig(
        source=location.locate(store), revision=location.revision, vae=vae, component_configs=configs,
        prediction_type=recipe.get("prediction_type"),
        dtype=identity["dtype"], clip_skip=identity["clip_skip"], negative_prompt=identity.get("negative_prompt", "")))
    model = replace(model, **recorded_syntax(identity), auto_dtype=recipe.get("auto_dtype", False))
    refuse_other_model("target", model.fingerprint, identity["fingerprint"])
    if identity.get("lora"):
        model = model.with_lora(Path(Location.model_validate(recipe["lora"]).locate(store)), identity["lora"]["weight"])
        assert isinstance(model.lora, Lora)
        refuse_other_model("LoRA", model.lora.fingerprint, identity["lora"]["fingerprint"])
    if identity.get("personaliser"):
        adapter = _find_located_adapter(store, recipe["personaliser"], model)
        refuse_other_model("personaliser", adapter.fingerprint, identity["personaliser"]["fingerprint"])
        model = replace(model, personaliser=adapter)
    return model


def _find_located_adapter(store: Store, recipe: Mapping[str, Any], model: Model) -> Adapter:
    found = {name: Location.model_validate(recipe[name]).locate(store) if recipe[name] else None
             for name in ("source", "image_encoder")}
    return find_adapter(PersonaliserConfig.model_validate({**recipe["config"], **found}), model)


def refuse_other_model(what: str, found: str, planned: str) -> None:
    """ModelError where the fingerprint of what was found is not the planned one."""
    if found != planned:
        raise ModelError(f"the {what} found here has fingerprint {found[:12]}, this work was planned with "
                         f"{planned[:12]}: put the same weights there, or start the run that planned it again")
