"""Evaluate a personalised target: is the right person found among 20, and is the prompt still followed?

    python -m hgdpo_core.figures.make.personaliser_evaluation --adapter FOLDER --judge FOLDER

Test people were seen by none of the networks but the target, whose captions name no badge and no skin. The others of
the 20 have the same class word; concepts show the person in another pose and place than the prompt asks for.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from hgdpo_core.config import TargetConfig
from hgdpo_core.config.concepts import PersonaliserConfig
from hgdpo_core.models import Backbone, find_model, load_backbone
from hgdpo_core.models.personaliser import PersonalText, find_adapter, personalise
from hgdpo_core.models.sampling import initial_noise, sample_latents
from hgdpo_core.prompts import Sample
from hgdpo_core.prompts.concepts import Concept
from hgdpo_core.statistics.intervals import mean_interval

from .. import inspector_path, target_path
from ..dataset import HELD_OUT_SEED, to_model_range
from ..identities import Person, View, concept_image, distinct_people, draw_view
from ..identity_judge import IdentityNetwork, embed_people, load_identity_judge
from ..inspector import Inspector, attribute_indices, load_inspector
from ..people import PEOPLE, PLACES, POSES, VOCABULARIES

AMONG = 20
STEPS, GUIDANCE, BATCH = 10, 1.5, 32
STRENGTH, TOKEN_STRENGTH = 1.0, 1.0
"""beta and alpha, chosen on validation people (docs/EXPERIMENTS.md)."""


@dataclass(frozen=True)
class Case:
    """A test person, one concept view, and the views that are asked for; distractors' concepts follow."""

    person: Person
    concept: View
    asked: tuple[View, ...]
    others: tuple[View, ...]


def draw_cases(split: str, people: int, prompts: int, seed: int) -> list[Case]:
    """As many people, a quarter of each class word, each with so many prompts in other poses and places."""
    cases: list[Case] = []
    for number, word in enumerate(PEOPLE):
        count = len(range(number, people, len(PEOPLE)))
        found = distinct_people(split, count + AMONG - 1, seed, person=word)
        rng = np.random.default_rng([seed, number])
        views = [draw_view(person, rng) for person in found]
        for row in range(count):
            poses = rng.permutation([pose for pose in POSES if pose != views[row].pose])
            places = [place for place in PLACES if place != views[row].place]
            asked = tuple(draw_view(found[row], rng, pose=str(pose), place=places[int(rng.integers(len(places)))])
                          for pose in poses[:prompts])
            rest = [view for index, view in enumerate(views) if index != row]
            others = tuple(rest[i] for i in rng.permutation(len(rest))[:AMONG - 1])
            cases.append(Case(found[row], views[row], asked, others))
    return cases


def as_concept(view: View) -> Concept:
    """A concept of one cut-out image, as a file would hold it."""
    file = BytesIO()
    concept_image(view).save(file, "PNG")
    return Concept("person", (file.getvalue(),))


@torch.no_grad()
def generate_views(backbone: Backbone, prompts: Sequence[str]) -> np.ndarray:
    """One image per prompt, uint8 `[B,64,64,3]`, each from a seed of its own place in the list."""
    images = []
    for first in range(0, len(prompts), BATCH):
        part = prompts[first:first + BATCH]
        texts = backbone.text.encode(part)
        joined = type(texts[0]).join(texts)
        noise = initial_noise([HELD_OUT_SEED + first + i for i in range(len(part))], *backbone.latent_shape((64, 64)))
        latents = sample_latents(backbone.denoiser, backbone.schedule.solver(), joined,
                                 backbone.text.negative(joined.length), noise, steps=STEPS, guidance_scale=GUIDANCE)
        images.append(backbone.codec.decode(latents).pixels)
    return np.concatenate(images)


def open_personalised(target: Path, adapter: Path, strength: float, token_strength: float) -> Backbone:
    """The target with the adapter, for people cut out already."""
    model = find_model(TargetConfig(source=str(target)))
    settings = PersonaliserConfig(source=str(adapter), strength=strength, token_strength=token_strength, crop=None)
    return personalise(load_backbone(model, dtype="float32"), find_adapter(settings, model))


def generate_both(cases: Sequence[Case], target: Path, adapter: Path, strength: float,
                  token_strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Images `[people * prompts,64,64,3]` with the adapter and without, from the same prompts and seeds."""
    on = open_personalised(target, adapter, strength, token_strength)
    assert isinstance(on.text, PersonalText)
    samples: list[str] = []
    for case in cases:
        concept = as_concept(case.concept)
        on.text.learn(concept.id, concept.pictures())
        samples += [Sample(view.prompt(), concept.id) for view in case.asked]
    off = load_backbone(find_model(TargetConfig(source=str(target))), dtype="float32")
    return generate_views(on, samples), generate_views(off, [str(sample) for sample in samples])


def measure(cases: Sequence[Case], images: np.ndarray, judge: IdentityNetwork) -> tuple[np.ndarray, np.ndarray]:
    """Per person and prompt `[P,K]`: whether the person is closest among 20, and the closeness to the concept."""
    seen = embed_people(judge, images).reshape(len(cases), -1, 64)
    found, closeness = [], []
    for case, row in zip(cases, seen, strict=True):
        concepts = embed_people(judge, [np.asarray(concept_image(v)) for v in (case.concept, *case.others)])
        near = row @ concepts.T
        found.append(near.argmax(1) == 0)
        closeness.append(near[:, 0])
    return np.stack(found), np.stack(closeness)


def follow(cases: Sequence[Case], images: np.ndarray, inspector: Inspector) -> dict[str, float]:
    """What the inspector sees: how often pose and place are as asked, and hair, top and trousers the concept's."""
    logits = inspector(to_model_range(images))
    wanted = torch.tensor([attribute_indices(case.person.figure(view.pose, view.place))
                           for case in cases for view in case.asked])
    return {name: round(float((logits[i].argmax(-1) == wanted[:, i]).float().mean()), 3)
            for i, name in enumerate(VOCABULARIES)}


def evaluate_personaliser(target: Path, adapter: Path, judge_folder: Path, *, split: str = "test", people: int = 64,
                          prompts: int = 8, strength: float = STRENGTH, token_strength: float = TOKEN_STRENGTH,
                          seed: int = 9, inspector_folder: Path | None = None) -> dict:
    """Rates with 95 % intervals over people, adapter on and off."""
    cases, judge = draw_cases(split, people, prompts, seed), load_identity_judge(judge_folder)
    on, off = generate_both(cases, target, adapter, strength, token_strength)
    (found, near), (found_off, near_off) = (measure(cases, images, judge) for images in (on, off))
    preferred = (near > near_off).mean(1)
    inspector = load_inspector(inspector_folder or inspector_path())
    return {"people": people, "prompts": people * prompts, "split": split, "strength": strength,
            "token_strength": token_strength, "top_1_on": _rate(found.mean(1)), "top_1_off": _rate(found_off.mean(1)),
            "prefers_on": _rate(preferred),
            "inspector_on": follow(cases, on, inspector), "inspector_off": follow(cases, off, inspector)}


def _rate(per_person: np.ndarray) -> dict[str, float | None]:
    interval = mean_interval(per_person)
    low, high = interval if interval is not None else (None, None)
    return {"rate": round(float(per_person.mean()), 4), "low": low and round(low, 4), "high": high and round(high, 4)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=target_path())
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--strength", type=float, default=STRENGTH)
    parser.add_argument("--token-strength", type=float, default=TOKEN_STRENGTH)
    options = parser.parse_args(arguments)
    found = evaluate_personaliser(options.target, options.adapter, options.judge, split=options.split,
                                  people=options.people, prompts=options.prompts, strength=options.strength,
                                  token_strength=options.token_strength)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
