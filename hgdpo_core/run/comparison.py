"""A comparison of two models, opened: `hgdpo evaluate` without the rest of the pipeline.

Each side is a whole model (diffusers folder, .safetensors file, hub id, built in) or a LoRA applied to a base model.
Everything a user can get wrong is checked here, before any model loads.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hgdpo_core import __version__
from hgdpo_core.built_in import SOURCE, concept_prompts, concept_settings, is_built_in, people_folder
from hgdpo_core.config import ComparisonConfig, ConceptsConfig, DrawingConfig, RunConfig, TargetConfig
from hgdpo_core.config.base import apply_overrides, content_hash, validate
from hgdpo_core.config.presets import DEFAULT_PRESET, PARTI_PROMPTS, build_config
from hgdpo_core.errors import ConfigError, InputError
from hgdpo_core.evaluate import plan_evaluation
from hgdpo_core.models import Model, check_lora, find_model
from hgdpo_core.models.files import is_lora
from hgdpo_core.models.personaliser import PERSONALISERS, find_adapter
from hgdpo_core.models.weight_files import WEIGHT_SUFFIXES
from hgdpo_core.prompts import PromptList, read_prompts, save_prompts
from hgdpo_core.prompts.concepts import ConceptList, read_concepts, save_concept
from hgdpo_core.prompts.syntax import check_syntax
from hgdpo_core.run import shell_command
from hgdpo_core.scorers import require_scorers
from hgdpo_core.scorers.identity import face_finder, find_detector, locate_judge, needs_detector
from hgdpo_core.storage import Store
from hgdpo_core.storage.roots import default_root

DEFAULT_JUDGE = "sface"
OF_SINGLE_FILES = {"component_configs": None, "prediction_type": None}
"""Settings of a target that a folder has files of its own for."""


@dataclass(frozen=True)
class ComparisonRun:
    """Checked inputs of one comparison. Cheap to hold: no tensors, no network."""

    config: ComparisonConfig
    store: Store
    run_id: str
    target: Model
    tuned: Model
    sweep: tuple[Model, ...]
    """The tuned model at the weights of `lora_weights`, ascending, that at `evaluation.lora_weight` among them."""
    evaluation_prompts: PromptList
    command: str
    """Shell line that starts this comparison again."""
    people: ConceptList | None = None
    """Whose images condition all models beside the prompts; None for a comparison by prompts alone."""
    detector: Path | None = None
    """Weights of the face detector, where judges of identity need one."""

    @property
    def samples(self) -> tuple[str, ...]:
        """What images are generated for: the prompts, or each person with all or some of them."""
        people = (None,) if self.people is None else self.people.concepts
        return tuple(person.sample(prompt) if person else prompt
                     for person, prompts in zip(people, self._prompts_of_people, strict=True) for prompt in prompts)

    @property
    def sample_prompts(self) -> tuple[str, ...]:
        """The prompt of each sample, as it was written."""
        return tuple(prompt for prompts in self._prompts_of_people for prompt in prompts)

    @property
    def _prompts_of_people(self) -> list[Sequence[str]]:
        """The prompts of each person, in turn others where there are not all for each."""
        prompts = self.evaluation_prompts.prompts
        if self.people is None or self.config.concepts is None:
            return [prompts]
        count = min(self.config.concepts.prompts_per_concept or len(prompts), len(prompts))
        return [[prompts[(number * count + place) % len(prompts)] for place in range(count)]
                for number in range(len(self.people.concepts))]

    @property
    def models(self) -> dict[str, Model]:
        """All that generate images: "target", "tuned", and the other weights of the sweep by their name."""
        others = {weight_name(model): model for model in self.sweep if model != self.tuned}
        return {"target": self.target, "tuned": self.tuned, **others}

    def key(self, name: str) -> str:
        """Key of a file of this comparison, for example `runs/<run_id>/summary.json`."""
        return f"runs/{self.run_id}/{name}"


def open_comparison(preset: str = DEFAULT_PRESET, root: str | None = None, *, tuned: str | None = None,
                    target: str | None = None, base: str | None = None, prompts: str | None = None,
                    scorers: Sequence[str] | None = None, images_per_prompt: int | None = None,
                    lora_weight: float | None = None, target_lora_weight: float | None = None,
                    lora_weights: Sequence[float] | None = None, concepts: str | None = None,
                    personaliser: str | None = None, judges: Sequence[str] | None = None,
                    overrides: Mapping[str, Any] | None = None) -> ComparisonRun:
    """Build the config, check root, prompts, models and scorers, and write `runs/<run_id>/config.json`.

    `scorers` are names, or `name=source`; a name alone is the preset's scorer of that name, else the public one.
    With `concepts`, a folder of people's images, both models are personalised by the same adapter, `personaliser`.
    What is None is the preset's. ConfigError, InputError, ModelError or StorageError name in one line what is wrong.
    """
    if tuned is None:
        raise InputError("there is nothing to compare the target with: give tuned, a model or a LoRA")
    changes = {"images_per_prompt": images_per_prompt, "lora_weight": lora_weight,
               "prompts": None if prompts is None else {"source": prompts}}
    # a preset requires training prompts too; nothing here reads them
    base_config = build_config(preset, target=target, prompts=prompts or PARTI_PROMPTS)
    config = _build(base_config, scorers, changes,
                    {"tuned": tuned, "base": base, "target_lora_weight": target_lora_weight,
                     "lora_weights": tuple(lora_weights or ()),
                     "concepts": _concept_settings(base_config, concepts, personaliser, judges)})
    if overrides:
        config = apply_overrides(config, overrides)
    store = Store(default_root() if root is None else root)
    if prompts is None and config.concepts is not None and is_built_in(config.concepts.source):
        evaluation_prompts = PromptList(concept_prompts())
    else:
        evaluation_prompts = read_prompts(config.evaluation.prompts, store)
    check_syntax([config.target.negative_prompt], config.target.prompt_syntax)
    check_syntax(evaluation_prompts.prompts, config.evaluation.prompt_syntax)
    models = _find_models(config, lora_weight)
    if config.sampler.latent_normalisation and models[1].lora is None:
        raise ConfigError(f"sampler.latent_normalisation is on, but the tuned model {tuned} is not a LoRA: only a LoRA "
                          "has a reference to take channel statistics from")
    if config.lora_weights and models[1].lora is None:
        raise ConfigError(f"lora_weights is {list(config.lora_weights)}, but the tuned model {tuned} is not a LoRA: "
                          "leave it out")
    require_scorers(config.evaluation.scorers, option="--scorers ")
    people, detector = (None, None) if config.concepts is None else open_people(config.concepts, config.target)
    store.check_writable()
    options = {"preset": preset, "root": store.root, "target": target, "tuned": tuned, "base": base, "prompts": prompts,
               "images-per-prompt": images_per_prompt, "lora-weight": lora_weight,
               "target-lora-weight": target_lora_weight,
               "lora-weights": ",".join(map(str, lora_weights)) if lora_weights else None,
               "scorers": ",".join(scorers) if scorers else None, "concepts": concepts, "personaliser": personaliser,
               "judges": ",".join(judges) if judges else None}
    command = shell_command("evaluate", options, overrides or {})
    run = ComparisonRun(config, store, f"evaluate-{content_hash(config.identity('run'))}", *models,
                        _sweep(models[1], config.lora_weights), evaluation_prompts, command, people, detector)
    for model in models:
        if model.personaliser is not None:
            PERSONALISERS[model.personaliser.name].check_prompts(
                model.personaliser, model.reading(config.evaluation.prompt_syntax), run.samples)
    save_prompts(store, evaluation_prompts)
    for person in people.concepts if people else ():
        save_concept(store, person)
    store.write_json(run.key("config.json"), {"code_version": __version__, **config.model_dump(mode="json")})
    return run


def plan_comparison(run: ComparisonRun) -> list[dict[str, Any]]:
    """What a comparison would generate and what exists, a row per model, without generating it."""
    config, samples = run.config, run.samples
    plans = {name: plan_evaluation(run.store, model, config.sampler, config.pool, config.evaluation, samples)
             for name, model in run.models.items()}
    return [{"stage": name, "pool_id": plan.pool_id, "shards": len(plan.shards), "missing_shards": len(plan.missing),
             "images": plan.images, "missing_images": plan.missing_images} for name, plan in plans.items()]


def _build(preset: RunConfig, scorers: Sequence[str] | None, evaluation: Mapping[str, Any],
           settings: Mapping[str, Any]) -> ComparisonConfig:
    known = {scorer.name: scorer.model_dump() for scorer in (preset.scorer, *preset.evaluation.scorers)}
    changes = {name: value for name, value in evaluation.items() if value is not None}
    if scorers:
        named = [text.partition("=") for text in scorers]
        changes["scorers"] = [{"name": name, "source": source} if source else known.get(name, {"name": name})
                              for name, _, source in named]
    return validate(ComparisonConfig, {
        "preset": preset.preset, "target": preset.target.model_dump(), **settings,
        "sampler": preset.sampler.model_dump(),
        "pool": preset.pool.model_dump(include=set(DrawingConfig.model_fields)),
        "evaluation": {**preset.evaluation.model_dump(), **changes}, "workers": preset.workers.model_dump()})


def _concept_settings(config: RunConfig, concepts: str | None, personaliser: str | None,
                      judges: Sequence[str] | None) -> dict[str, Any] | None:
    """The settings of a personalised comparison; InputError where only a part of it is given."""
    if concepts is None:
        for name, value in {"personaliser": personaliser, "judges": judges}.items():
            if value is not None:
                raise InputError(f"{name} is given without concepts: give the folder with people's images, or leave it "
                                 "out")
        return None
    if is_built_in(concepts):
        given = {"personaliser": personaliser and {"source": personaliser, "crop": None}, "judges": judges}
        return {**concept_settings(), **{name: value for name, value in given.items() if value}}
    if personaliser is None:
        raise InputError("concepts are given without a personaliser: give an IP-Adapter for SD 1.5, such as "
                         "ip-adapter-plus-face_sd15.safetensors of h94/IP-Adapter, or one that was trained here")
    return {"source": concepts, "personaliser": {"source": personaliser},
            "judges": tuple(judges or (SOURCE if is_built_in(config.target.source) else DEFAULT_JUDGE,))}


def open_people(config: ConceptsConfig, target: TargetConfig) -> tuple[ConceptList, Path | None]:
    """The people, each with a face where one is needed, and the detector that found it, None if no judge needs one.

    Drawn people of the built-in target are found by its own finder. The judges are there too.
    """
    for judge in config.judges:
        locate_judge(judge)
    judged, cropped = needs_detector(config.judges), config.personaliser.crop is not None
    if judged and is_built_in(config.detector):
        raise ConfigError(f"concepts.detector is {config.detector}, which finds drawn faces, but a judge of "
                          "photographs needs the public one: leave it out")
    drawn = is_built_in(target.source) and not judged
    detector = find_detector(config.detector or (SOURCE if drawn else None)) if judged or cropped else None
    find_faces = face_finder(detector) if judged or cropped else None
    with people_folder() if is_built_in(config.source) else nullcontext(Path(config.source)) as folder:
        return read_concepts(folder, config.images_per_concept, find_faces), detector


def _find_models(config: ComparisonConfig, lora_weight: float | None) -> tuple[Model, Model]:
    """Target and tuned model, with its LoRA applied where one is given."""
    target_lora, tuned_lora = (_local_lora(source) for source in (config.target.source, config.tuned))
    if config.target_lora_weight is not None and target_lora is None:
        raise ConfigError(f"target_lora_weight is {config.target_lora_weight}, but the target {config.target.source} "
                          "is not a LoRA: leave it out")
    for name, value in {"lora_weight": lora_weight, "base": config.base}.items():
        if value is not None and target_lora is None and tuned_lora is None:
            raise ConfigError(f"{name} is {value}, but neither {config.target.source} nor {config.tuned} is a LoRA: "
                              "leave it out")
    if config.base is None and target_lora is not None:
        raise InputError(f"the target {config.target.source} is a LoRA: give base, the model that it was trained for")
    weight = config.evaluation.lora_weight

    def find(source: str, lora: Path | None, lora_weight: float) -> Model:
        base = source if lora is None else config.base or config.target.source
        found = config.target
        if base != found.source:  # what names or completes the target's files says nothing of another model's
            alone = {"revision": None} | ({} if base.endswith(WEIGHT_SUFFIXES) else OF_SINGLE_FILES)
            found = found.model_copy(update={"source": base, **alone})
        model = find_model(found)
        if lora is not None:
            check_lora(model, lora)
            model = model.with_lora(lora, lora_weight)
        if config.concepts is None:
            return model
        return replace(model, personaliser=find_adapter(config.concepts.personaliser, model))

    target = find(config.target.source, target_lora, config.target_lora_weight or weight)
    tuned = find(config.tuned, tuned_lora, weight)
    if target.identity() == tuned.identity():
        raise InputError(f"target and tuned are the same model ({config.tuned}): there is nothing to compare")
    return target, tuned


def _sweep(tuned: Model, weights: Sequence[float]) -> tuple[Model, ...]:
    if tuned.lora is None or not weights:
        return ()
    return tuple(replace(tuned, lora=replace(tuned.lora, weight=weight))
                 for weight in sorted({*weights, tuned.lora.weight}))


def weight_name(model: Model) -> str:
    """The name of a model of the sweep for people."""
    assert model.lora is not None
    return f"LoRA weight {model.lora.weight:g}"


def _local_lora(source: str) -> Path | None:
    path = Path(source).expanduser()
    return path if path.exists() and is_lora(path) else None
