"""Folders and files of weights for every scorer, named as its original names them: random, from tests/golden."""

import json
import shutil
from pathlib import Path

import torch
from golden import scorer_inputs
from safetensors.torch import save_file

from hgdpo_core.scorers import towers

GOLDEN = Path(__file__).parent / "golden"
CLIP_VOCABULARY = GOLDEN / "clip_vocabulary"


def read_golden(size: str = "tiny") -> dict:
    """What the originals gave: scores, shapes, versions; "tiny" or "full"."""
    return json.loads((GOLDEN / f"scorers_{size}.json").read_text())


def weights_of(scorer: str, size: str = "tiny") -> dict[str, torch.Tensor]:
    """The random weights that the original was given."""
    shapes = read_golden(size)["scorers"][scorer]["shapes"]
    return {name: torch.from_numpy(value) for name, value in scorer_inputs.make_weights(shapes).items()}


def save_hps(folder: Path, size: str = "tiny", *, name: str = "HPS_v2.1_compressed.safetensors") -> Path:
    """A folder for hps_v2.1 (or .0 with its name): open_clip's tensors and the tokenizer."""
    shutil.copytree(CLIP_VOCABULARY, folder, dirs_exist_ok=True)
    save_file(weights_of("hps", size), folder / name)
    return folder


def save_clip_file(folder: Path, size: str = "tiny") -> Path:
    """A file with OpenAI's tensors, and the tokenizer beside it."""
    shutil.copytree(CLIP_VOCABULARY, folder, dirs_exist_ok=True)
    save_file(weights_of("clip", size), folder / "ViT-L-14.safetensors")
    return folder / "ViT-L-14.safetensors"


def save_clip(folder: Path, size: str = "tiny") -> Path:
    """A transformers CLIPModel folder of the same weights, as the hub has it."""
    file = save_clip_file(folder, size)
    tokenizer = towers.load_tokenizer([folder / "vocab.json", folder / "merges.txt"])
    towers.convert(file, tokenizer, act="quick_gelu", dtype=torch.float32).save_pretrained(folder)
    file.unlink()
    return folder


def save_aesthetic(folder: Path, size: str = "tiny") -> Path:
    """The head beside a CLIP."""
    save_clip(folder, size)
    save_file(weights_of("aesthetic", size), folder / "sac+logos+ava1-l14-linearMSE.safetensors")
    return folder


def save_imagereward(folder: Path, size: str = "tiny") -> Path:
    """ImageReward's tensors and BERT's vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / "bert_vocabulary.txt", folder / "vocab.txt")
    save_file(weights_of("imagereward", size), folder / "ImageReward.safetensors")
    return folder


SAVE = {"hps_v2.1": save_hps, "clip": save_clip, "aesthetic": save_aesthetic, "imagereward": save_imagereward}
