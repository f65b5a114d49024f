"""Pairs to train the labeller on, of three kinds of scenes, with random numbers of their own.

As for the judges, one image of a pair is correct and the other has a defect, and both are kept as rendered and through
the VAE. The scenes are people as the target draws them, people as the foreign generator does, and still lives.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from ..dataset import HELD_OUT_SEED
from ..foreign.prompts import Scene, sample_scenes, scene_caption
from ..foreign.renderer import render_foreign
from ..people import Figure
from ..renderer import DEFECTS, render
from .judge_data import KINDS as JUDGE_KINDS
from .judge_data import SMEARED, draw_pair, pass_through
from .loop import in_batches, save_tensors

VIEWS = ("target's people", "foreign people", "still lives")
TURNS = (0, 1, 0, 1, 2)
"""Which of VIEWS each pair of five shows."""
KINDS = (*JUDGE_KINDS, "missing_thing", "torn_thing")
EVEN_KINDS = {"people": (*DEFECTS, SMEARED),
              "still lives": ("missing_thing", "torn_thing", "wrong_colour", "wrong_caption", SMEARED)}
TRAINING_KINDS = {**EVEN_KINDS, "people": (*DEFECTS, SMEARED, "missing_limb", "detached_limb", "extra_limb")}
# Above those of the judges' pairs, and apart from each other.
BASES = {"train": 2**46, "validation": 2**47, "test": 2**48}


@dataclass(frozen=True)
class LabelledPairs:
    """N pairs. Index 0 of the second axis is the correct image, index 1 the other one."""

    captions: list[str]
    clean: Tensor  # uint8 [N,2,64,64,3]
    decoded: Tensor  # uint8 [N,2,64,64,3]
    kinds: Tensor  # int64 [N], index into KINDS
    views: Tensor  # int64 [N], index into VIEWS


def sample_views(split: str, count: int, rng: np.random.Generator) -> list[tuple[int, Scene]]:
    """`count` scenes of a split, in the turns of TURNS, each with its index into VIEWS."""
    people, stills = (iter(sample_scenes(split, count, rng, without_people=share)) for share in (0.0, 1.0))
    turns = [TURNS[i % len(TURNS)] for i in range(count)]
    return [(view, next(stills if view == 2 else people)) for view in turns]


def render_view(view: int, scene: Scene, seed: int, defect: str | None) -> np.ndarray:
    """uint8 `[64,64,3]`."""
    if view == 0 and isinstance(scene, Figure):
        return np.asarray(render(scene, seed, defect=defect))
    return np.asarray(render_foreign(scene, seed, defect=defect))


def make_labelled_pairs(vae: AutoencoderKL, count: int, *, split: str, seed: int,
                        kinds: dict[str, tuple[str, ...]] = EVEN_KINDS) -> LabelledPairs:
    """Render `count` pairs, the kinds of each view in turn, and pass them through the VAE."""
    rng = np.random.default_rng([seed, 99])
    scenes = sample_views(split, count, rng)
    names, turns = [], [0] * len(VIEWS)
    for view, _ in scenes:
        options = kinds["still lives" if view == 2 else "people"]
        names.append(options[turns[view] % len(options)])
        turns[view] += 1
    clean = np.empty((count, 2, 64, 64, 3), dtype=np.uint8)
    for part in in_batches(count, 256, "labeller: render"):
        for i in range(part.start, part.stop):
            view, scene = scenes[i]
            # draw_pair looks at the kind only
            pair = draw_pair(scene, names[i], rng, BASES[split])  # type: ignore[arg-type]
            clean[i] = [render_view(view, scene, *image) for image in pair]
    indices = torch.tensor([KINDS.index(name) for name in names])
    decoded = pass_through(vae, clean, indices, seed)
    images, smeared = torch.from_numpy(clean), indices == KINDS.index(SMEARED)
    images[smeared, 1] = decoded[smeared, 1]
    return LabelledPairs([scene_caption(scene) for _, scene in scenes], images, decoded, indices,
                         torch.tensor([view for view, _ in scenes]))


def cached_pairs(path: Path, make: Callable[[], LabelledPairs]) -> LabelledPairs:
    """The pairs in `path`, made first where the file is missing."""
    if not path.exists():
        pairs = make()
        tensors = {name: value.contiguous() for name, value in vars(pairs).items() if name != "captions"}
        text = torch.frombuffer(bytearray(json.dumps(pairs.captions).encode()), dtype=torch.uint8)
        save_tensors(path, {"captions": text, **tensors})
    tensors = load_file(path)
    captions = json.loads(tensors.pop("captions").numpy().tobytes())
    return LabelledPairs(captions, **tensors)


def held_out_pairs(vae: AutoencoderKL, count: int) -> LabelledPairs:
    """`count` pairs of the test split, with seeds that no training image had."""
    return make_labelled_pairs(vae, count, split="test", seed=HELD_OUT_SEED + 1)
