"""Export of a finished run's model: LoRA files, model card, on demand a whole pipeline, on demand to the Hub."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from safetensors import SafetensorError

from hgdpo_core.config import RunConfig, TargetConfig
from hgdpo_core.config.base import validate
from hgdpo_core.errors import ConfigError, InputError, ModelError, StorageError, first_line
from hgdpo_core.models import Model, find_model, load_backbone
from hgdpo_core.models.files import LORA_NAME
from hgdpo_core.models.fingerprints import TRAINING_FOLDERS
from hgdpo_core.models.lora import write_kohya_lora
from hgdpo_core.models.published import fetch_model, find_record
from hgdpo_core.report.model_card import TO_FILL_IN, render_card
from hgdpo_core.storage import Store

CARD_NAME, PIPELINE_NAME, BASE_NAME = "README.md", "pipeline", "base"


def export_run(store: Store, folder: Path, run_id: str | None = None, *, fused: bool = False,
               target: str | None = None) -> list[Path]:
    """Put a run's LoRA, its kohya file and a model card into a local folder; returns what was written.

    Where the run fine-tuned its target first, that fine-tuned model goes along as `base/`, a whole diffusers pipeline:
    the LoRA was trained and evaluated on it and on no other.
    `run_id`: may be left out where the root holds one finished run. `fused`: also a whole diffusers pipeline with the
    LoRA merged in at the run's LoRA weight, in the precision the run sampled in; `target`: the present path of the
    target model, if it moved. An existing model card stays: its fields are filled in by hand. InputError for a run that
    is missing or not finished, ModelError for a target that is not the run's, StorageError for a full disk.
    """
    config, summary = _read_run(store, run_id or _only_run(store))
    lora_id = _lora_id(summary)
    lora = fetch_model(store, lora_id)
    if lora is None:
        raise InputError(f"{store.url(f'models/{lora_id}')} is gone: start the run again, it makes what is missing")
    weight = summary["lora_weight"]
    tuned = _find_base(store, config, lora_id)
    moved = {"source": target} if target is not None else {}
    base = tuned or (_find_target(store, lora_id, config.target.model_copy(update=moved)) if fused else None)
    kohya_name = f"{lora_id}-kohya.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(lora / LORA_NAME, folder / LORA_NAME)
        if (lora / kohya_name).exists():
            shutil.copyfile(lora / kohya_name, folder / kohya_name)
        else:  # of an earlier version, which trained SD 1.5 alone
            write_kohya_lora(folder / LORA_NAME, folder / kohya_name)
        written = [folder / LORA_NAME, folder / kohya_name]
        if tuned is not None:
            _copy_base(tuned.path, folder / BASE_NAME)
            written.append(folder / BASE_NAME)
        if fused and base is not None:
            load_backbone(base.with_lora(lora, weight)).save(folder / PIPELINE_NAME)
            written.append(folder / PIPELINE_NAME)
        if not (folder / CARD_NAME).exists():
            card = render_card(config, summary, kohya_name=kohya_name, fused=fused)
            (folder / CARD_NAME).write_text(card, encoding="utf-8")
            written.append(folder / CARD_NAME)
        _share_mode(written, (folder / LORA_NAME).stat().st_mode)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write the export to {folder}: {first_line(error)}; free space or choose another "
                           "folder, then export again") from None
    return written


def _share_mode(written: Sequence[Path], mode: int) -> None:
    """Give all files the mode of a plainly written one: safetensors makes its files readable by their owner alone."""
    for path in written:
        for file in filter(Path.is_file, (path, *path.rglob("*"))):
            file.chmod(mode)


def _only_run(store: Store) -> str:
    runs = _list_finished(store)
    if len(runs) != 1:
        raise InputError(f"{store.root} holds {len(runs)} finished runs: name one" +
                         (f" of {', '.join(runs)}" if runs else " once there is one"))
    return runs[0]


def _list_finished(store: Store) -> list[str]:
    """Finished runs that trained a LoRA: evaluations and ablations have none to export."""
    return [name for name in sorted(store.list_folders("runs")) if store.exists(f"runs/{name}/summary.json")
            and "dpo" in store.read_object(f"runs/{name}/config.json")]


def _read_run(store: Store, run_id: str) -> tuple[RunConfig, dict[str, Any]]:
    for name in ("config.json", "summary.json"):
        if not store.exists(f"runs/{run_id}/{name}"):
            raise InputError(f"{store.url(f'runs/{run_id}')} has no {name}: expected the id of a finished run, one of "
                             f"{', '.join(_list_finished(store)) or 'none yet'}")
    config = store.read_object(f"runs/{run_id}/config.json")
    if "dpo" not in config:
        raise InputError(f"{run_id} compared models and trained none: expected the id of a finished run, one of "
                         f"{', '.join(_list_finished(store)) or 'none yet'}")
    config.pop("code_version", None)
    return validate(RunConfig, config), store.read_object(f"runs/{run_id}/summary.json", win_rate=dict)


def find_run_target(store: Store, run_id: str) -> TargetConfig:
    """The model that a finished run's LoRA was trained on, fine-tuned where the run had images; errors as `export_run`.
    """
    config, summary = _read_run(store, run_id)
    base = _find_base(store, config, _lora_id(summary))
    if base is None:
        return config.target
    replaced = dict.fromkeys(("revision", "vae", "component_configs", "prediction_type"))  # it is a folder with its own
    return config.target.model_copy(update={**replaced, "source": str(base.path)})


def _lora_id(summary: Mapping[str, Any]) -> str:
    # summaries of earlier versions name the LoRA by its URL alone
    return summary.get("lora_id") or summary["artifacts"]["lora"].rstrip("/").rpartition("/")[2]


def _find_base(store: Store, config: RunConfig, lora_id: str) -> Model | None:
    """As `_find_tuned`; InputError where a run had images and its fine-tuned model is gone."""
    tuned = _find_tuned(store, lora_id)
    if config.images is not None and tuned is None:
        raise InputError(f"the fine-tuned model that {lora_id} was trained on is gone from {store.url('models')}: "
                         "start the run again, it makes what is missing")
    return tuned


def _find_tuned(store: Store, lora_id: str) -> Model | None:
    """The run's fine-tuned model in the store, where the LoRA was trained on one."""
    identity = _trained_on(store, lora_id)
    for name in store.list_folders("models"):
        record = find_record(store, name)
        if record is not None and record["kind"] == "pipeline" and record["fingerprint"] == identity["fingerprint"]:
            path = fetch_model(store, name)
            assert path is not None  # its record is there
            return Model(path, identity["fingerprint"], identity["dtype"], identity["negative_prompt"],
                         identity["clip_skip"])
    return None


def _find_target(store: Store, lora_id: str, config: TargetConfig) -> Model:
    """The target at its present path; ModelError for one that the LoRA was not trained on."""
    identity, model = _trained_on(store, lora_id), find_model(config)
    if model.fingerprint != identity["fingerprint"]:
        raise ModelError(f"target {config.source} is not the model this LoRA was trained on (fingerprint "
                         f"{model.fingerprint[:12]}, expected {identity['fingerprint'][:12]}): give that one "
                         "with --target")
    return model


def _trained_on(store: Store, lora_id: str) -> dict[str, Any]:
    return store.read_object(f"models/{lora_id}/config.json", target=dict)["target"]


def _copy_base(source: Path, folder: Path) -> None:
    """A fine-tuned pipeline without what training and the store keep beside it."""
    parts = [path for path in source.iterdir() if path.is_dir() and path.name not in TRAINING_FOLDERS]
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        shutil.copytree(part, folder / part.name, dirs_exist_ok=True, copy_function=shutil.copyfile)
    shutil.copyfile(source / "model_index.json", folder / "model_index.json")


# -- the Hub


def check_push(repo_id: str, folder: Path, *, public: bool) -> None:
    """Refuse, before any work, a push that cannot succeed or that should not be public yet."""
    if repo_id.count("/") != 1:
        raise ConfigError(f"{repo_id!r} is not a repository on the Hub: expected owner/name")
    if not os.environ.get("HF_TOKEN"):
        raise ConfigError("pushing to the Hub needs a token with write access in the environment variable HF_TOKEN")
    card = folder / CARD_NAME
    if public and (not card.exists() or TO_FILL_IN in card.read_text(encoding="utf-8")):
        raise InputError(f"{card} has fields that say {TO_FILL_IN}: fill them in before the model goes public, "
                         "or push it privately first")


def push_folder(folder: Path, repo_id: str, *, public: bool = False, hub: HfApi | None = None) -> str:
    """Upload an export to the Hub, privately unless `public`; returns its address.

    The token is HF_TOKEN and nothing else. A repository that is already public takes no private push.
    """
    check_push(repo_id, folder, public=public)
    hub = hub or HfApi(token=os.environ["HF_TOKEN"])
    try:
        hub.create_repo(repo_id, private=not public, exist_ok=True)
        is_private = bool(hub.model_info(repo_id).private)
        if public == is_private:
            raise InputError(f"{repo_id} exists and is {'private' if is_private else 'public'}: change that on the "
                             f"Hub, {'leave out' if public else 'add'} --public, or choose another name")
        hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="HG-DPO export",
                          allow_patterns=[CARD_NAME, "*.safetensors", f"{PIPELINE_NAME}/**", f"{BASE_NAME}/**"])
    except InputError:
        raise
    except Exception as error:  # the hub client raises a wide family: all mean "was not taken"
        raise StorageError(f"the Hub did not take {repo_id}: {first_line(error)}; what was exported stays in {folder}, "
                           "try again") from None
    return f"https://huggingface.co/{repo_id}"
