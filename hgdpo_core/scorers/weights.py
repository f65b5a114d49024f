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

from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import ModelError, first_line
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.models.hub import quiet_transformers
from hgdpo_core.models.networks import check_finite, compare_shapes, refuse_report, shapes_of
from hgdpo_core.models.weight_files import TORCH_SUFFIXES, open_torch, read_tensor_infos

CONVERT = "save its tensors as .safetensors where you trust it"


def find_weights(source: str | None, names: Sequence[str], repository: str,
                 given_as: str = "the scorer's source") -> Path:
    """The weights file that `source` names: itself, the first of `names` in a folder, or of a hub repository."""
    path = local_path(source)
    if path is None:
        return download(source or repository, names, given_as)
    found = path if path.is_file() else first_of(path, names)
    if found is None:
        raise ModelError(f"{path} holds no {' or '.join(names)}: put the last of these, from {repository}, there")
    return found


def local_path(source: str | None) -> Path | None:
    """`source` as a file or folder of this machine; None where it is a hub id, or None itself."""
    if source is None:
        return None
    path = Path(source).expanduser()
    if path.exists():
        return path
    is_file_name = path.suffix in (".safetensors", *TORCH_SUFFIXES)
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1 or is_file_name:
        raise ModelError(f"{source} does not exist: expected a folder, a weights file or a hub id")
    return None


def first_of(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of `names` that `folder` holds."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def find_files(what: str, source: str | None, weights: Path, choices: Sequence[Sequence[str]],
               repository: str) -> list[Path]:
    """All files of the first complete choice beside a user's own weights, or else the last choice from the hub.

    Not beside weights from the hub, whose cache may hold more or less. `what` names them in the error, for example
    "the CLIP tokenizer".
    """
    folder = weights.parent if local_path(source) else None
    found = all_of(folder, choices) if folder else []
    where = f"beside the weights in {folder}" if folder else "beside its weights and give that folder as its source"
    return found or download_files(repository, choices[-1], what, where)


def all_of(folder: Path, choices: Sequence[Sequence[str]]) -> list[Path]:
    """All files of the first choice that `folder` holds completely, or none."""
    return next(([folder / name for name in names] for names in choices
                 if all((folder / name).is_file() for name in names)), [])


def download_files(repository: str, names: Sequence[str], what: str, where: str) -> list[Path]:
    """All of `names` from one commit of a hub repository (or from the local copy of it)."""
    reason = "offline, and not all of them are in the cache"
    try:
        found = all_of(Path(snapshot_download(repository, allow_patterns=list(names))), [names])
    except Exception as error:  # the hub client raises a wide family: all mean "could not be downloaded"
        found, reason = [], first_line(error)
    if not found:
        raise ModelError(f"it needs {what}: {' and '.join(names)} of {repository} could not be downloaded ({reason}): "
                         f"put them {where}")
    return found


def download(repository: str, names: Sequence[str], given_as: str = "the scorer's source") -> Path:
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
    raise ModelError(f"{names[-1]} of {repository} could not be downloaded ({reason}): put it into a folder and give "
                     f"that as {given_as}")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, unwrapped from a checkpoint; only data is read, never code (weights_only)."""
    try:
        if path.suffix == ".safetensors":
            read_tensor_infos(path)  # its errors are more precise
            tensors = load_file(path)
        else:
            tensors = open_torch(path, convert=CONVERT)
    except ModelError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path} does not read as weights: {first_line(error)}") from None
    tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    check_finite(path, {"the file": tensors}, "it is broken, get it again")
    return tensors


def read_empty_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The same tensors without their numbers, from the file's header."""
    return {name.removeprefix("module."): torch.empty(info.shape, device="meta")
            for name, info in read_tensor_infos(path).items()}


def count_blocks(tensors: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many blocks are numbered behind `prefix`; KeyError when none is."""
    numbers = [int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix)]
    if not numbers:
        raise KeyError(f"{prefix}0")
    return 1 + max(numbers)


@contextmanager
def sizes_read_from(path: Path, what: str) -> Iterator[None]:
    """Inside, sizes of a network are read from tensors; ModelError where `path` does not hold those of `what`."""
    try:
        yield
    except KeyError as error:
        raise ModelError(f"{path} lacks {error.args[0]}: expected the tensors of {what}") from None
    except (ValueError, IndexError, RuntimeError, TypeError) as error:
        raise ModelError(f"{path} holds tensors of other shapes than {what}: {first_line(error)}") from None


def renamed(name: str, whole: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """A tensor's new name: the first of `whole` that it is, or begins with if that ends in a dot, and all `parts`."""
    for old, new in whole.items():
        if name == old or old.endswith(".") and name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def check_build(path: Path, kind: Any, config: Any, tensors: Mapping[str, torch.Tensor], **options: Any) -> None:
    """ModelError where `tensors` (or their shapes alone, on the meta device) are not all that a `kind` holds."""
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            network = kind(config, **options)
    except Exception as error:  # any value of any setting may be wrong, and each fails in its own way
        raise ModelError(f"{path} does not fit the architecture: {first_line(error)}") from None
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    compare_shapes(path, getattr(kind, "__name__", "the network"), given, shapes_of(network))


def build(path: Path, kind: Any, config: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, *,
          attention: str | None = None, **options: Any) -> Any:
    """A transformers model of class `kind` that holds exactly `tensors`; ModelError for a missing or unknown one."""
    check_build(path, kind, config, tensors, **options)
    if attention is not None:
        options["attn_implementation"] = attention
    try:
        with quiet_transformers():
            model, report = kind.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype,
                                                 output_loading_info=True, **options)
    except Exception as error:  # what passed the check may still fail in any way
        raise ModelError(f"{path} does not fit the architecture: {first_line(error)}") from None
    refuse_report(str(path), report)
    return model


def freeze(model: Any, device: str) -> Any:
    """`model` on its device, for inference only."""
    return model.to(device).eval().requires_grad_(False)


def fingerprint(scorer: str, files: Iterable[Path], **numerics: Any) -> str:
    """sha256 (64 hex digits) of what decides a score: the files' contents, wherever they are, and our own choices."""
    return content_hash({"scorer": scorer, "files": [[file.name, fingerprint_path(file)] for file in files],
                         **numerics}, length=64)
