"""What a scorer is made of: found in a folder or on the hub, read safely, fingerprinted by content.

A scorer's `source` names its own weights: None for the public ones, a hub id, a folder or a file. What goes with
them (tokenizer, CLIP towers) is looked for in the same folder first, then on the hub.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from hgdpo_core.config import content_hash
from hgdpo_core.errors import ModelError
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.models.hub import first_line, quiet_transformers
from hgdpo_core.models.networks import check_finite, compare_shapes, refuse_report, shapes_of
from hgdpo_core.models.weight_files import TORCH_SUFFIXES as PICKLED
from hgdpo_core.models.weight_files import open_torch, read_tensor_infos

CONVERT = "save its tensors as .safetensors where you trust it"


def find_weights(scorer: str, source: str | None, names: Sequence[str], repository: str) -> Path:
    """The weights file that `source` names: itself, the first of `names` in a folder, or of a hub repository."""
    place = local_place(scorer, source)
    if place is None:
        return download(scorer, source or repository, names)
    if place.is_file():
        return place
    found = first_of(place, names)
    if found is None:
        raise ModelError(f"scorer {scorer}: {place} holds no {' or '.join(names)}: put the last of these, "
                         f"from {repository}, there")
    return found


def local_place(scorer: str, source: str | None) -> Path | None:
    """`source` as a file or folder of this machine; None where it is a hub id, or None itself."""
    if source is None:
        return None
    place = Path(source).expanduser()
    if place.exists():
        return place
    is_file_name = place.suffix in (".safetensors", *PICKLED)
    if place.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1 or is_file_name:
        raise ModelError(f"scorer {scorer}: {source} does not exist: expected a folder, a weights file or a hub id")
    return None


def beside(scorer: str, source: str | None, weights: Path) -> Path | None:
    """The user's own folder with `weights`; None where they come from the hub, whose cache may hold more or less."""
    return weights.parent if local_place(scorer, source) else None


def first_of(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of `names` that lies in `folder`."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def find_files(scorer: str, what: str, folder: Path | None, choices: Sequence[Sequence[str]],
               repository: str) -> list[Path]:
    """All files of the first complete choice, from `folder` or else from the hub, where the last choice lies.

    `what` names them in the error, for example "the CLIP tokenizer".
    """
    found = all_of(folder, choices) if folder else []
    where = f"beside the weights in {folder}" if folder else "beside its weights and give that folder as its source"
    return found or download_files(scorer, repository, choices[-1], f"needs {what}", where)


def all_of(folder: Path, choices: Sequence[Sequence[str]]) -> list[Path]:
    """All files of the first choice that lies in `folder` complete, or none."""
    return next(([folder / name for name in names] for names in choices
                 if all((folder / name).is_file() for name in names)), [])


def download_files(scorer: str, repository: str, names: Sequence[str], why: str, where: str) -> list[Path]:
    """All of `names` from one commit of a hub repository (or from the local copy of it)."""
    reason = "offline, and not all of them are in the cache"
    try:
        found = all_of(Path(snapshot_download(repository, allow_patterns=list(names))), [names])
    except Exception as error:  # the hub client raises a wide family: all mean "could not be had"
        found, reason = [], first_line(error)
    if not found:
        raise ModelError(f"scorer {scorer} {why}: {' and '.join(names)} of {repository} could not be downloaded "
                         f"({reason}): put them {where}")
    return found


def download(scorer: str, repository: str, names: Sequence[str]) -> Path:
    """The first of `names` that a hub repository (or the local copy of it) holds."""
    reason = "no such file"
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # offline: not in the cache, perhaps under another name
                reason = first_line(error)
        except Exception as error:  # as above
            reason = first_line(error)
            break
    raise ModelError(f"scorer {scorer}: {names[-1]} of {repository} could not be downloaded ({reason}): put it into a "
                     "folder and give that as the scorer's source")


def read_tensors(scorer: str, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, unwrapped from a checkpoint; only data is read, never code (weights_only)."""
    with _of_scorer(scorer):
        try:
            tensors = load_file(path) if _is_safetensors(path) else open_torch(path, convert=CONVERT)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{path} does not read as weights: {first_line(error)}") from None
    tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    check_finite(f"scorer {scorer}: {path}", {"the file": _Bag(tensors)}, "it is broken, get it again")
    return tensors


def read_empty_tensors(scorer: str, path: Path) -> dict[str, torch.Tensor]:
    """The same tensors without their numbers, from the file's header."""
    with _of_scorer(scorer):
        infos = read_tensor_infos(path)
    return {name.removeprefix("module."): torch.empty(info.shape, device="meta") for name, info in infos.items()}


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        read_tensor_infos(path)
        return True
    return False


class _Bag(torch.nn.Module):
    """Tensors that belong to no network yet."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        self.tensors = dict(tensors)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return self.tensors


@contextmanager
def _of_scorer(scorer: str) -> Iterator[None]:
    """Errors that say which scorer they are about."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"scorer {scorer}: {error}") from None


def count_blocks(tensors: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many blocks are numbered behind `prefix`; KeyError when none is."""
    numbers = [int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix)]
    if not numbers:
        raise KeyError(f"{prefix}0")
    return 1 + max(numbers)


def check_build(scorer: str, path: Path, kind: Any, config: Any, tensors: Mapping[str, torch.Tensor],
                **options: Any) -> None:
    """ModelError where `tensors` (or their shapes alone, on the meta device) are not all that a `kind` holds."""
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            network = kind(config, **options)
    except Exception as error:  # any value of any setting may be wrong, and each fails in its own way
        raise ModelError(f"scorer {scorer}: {path} does not fit the architecture: {first_line(error)}") from None
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    compare_shapes(f"scorer {scorer}: {path}", getattr(kind, "__name__", "the network"), given, shapes_of(network))


def build(scorer: str, path: Path, kind: Any, config: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, *,
          attention: str | None = None, **options: Any) -> Any:
    """A transformers model of class `kind` that holds exactly `tensors`; ModelError names one that lacks or is over."""
    check_build(scorer, path, kind, config, tensors, **options)
    if attention is not None:
        options["attn_implementation"] = attention
    with quiet_transformers():
        try:
            model, report = kind.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype,
                                                 output_loading_info=True, **options)
        except Exception as error:  # what passed the check may still fail in any way
            raise ModelError(f"scorer {scorer}: {path} does not fit the architecture: {first_line(error)}") from None
    refuse_report(f"scorer {scorer}: {path}", report)
    return model


def freeze(model: Any, device: str) -> Any:
    """`model` on its device, for inference only."""
    return model.to(device).eval().requires_grad_(False)


def fingerprint(scorer: str, files: Iterable[Path], **numerics: Any) -> str:
    """sha256 (64 hex digits) of what decides a score: the files' contents, wherever they lie, and our own choices."""
    return content_hash({"scorer": scorer, "files": [[file.name, fingerprint_path(file)] for file in files],
                         **numerics}, length=64)
