"""Training of an InstantBooth adapter on a user's images of people, beside the frozen target: `hgdpo personalise`.

`open_personalise` checks everything before a model loads, `train_adapter` makes what is missing, `write_summary` keeps
what came out. The adapter is one for `hgdpo evaluate --concepts` (arXiv:2405.20216v1, Section 5.4).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgdpo_core import __version__
from hgdpo_core.built_in import SOURCE, find_people_images, is_built_in
from hgdpo_core.config import PersonaliseConfig
from hgdpo_core.config.base import apply_overrides, content_hash
from hgdpo_core.config.concepts import CROP
from hgdpo_core.config.presets import DEFAULT_PRESET, build_personalise_config
from hgdpo_core.devices import default_device
from hgdpo_core.errors import InputError
from hgdpo_core.execution.runner import IN_PROCESS, Runner
from hgdpo_core.export.run import find_run_target
from hgdpo_core.image_sets import ImageSet, read_image_set
from hgdpo_core.models import Model, find_model
from hgdpo_core.models.instantbooth import NAME, check_trainable
from hgdpo_core.models.published import find_record
from hgdpo_core.pipeline import OnTraining
from hgdpo_core.progress import StageProgress, StageTimes, silent_stages
from hgdpo_core.run import shell_command
from hgdpo_core.scorers.identity import detector_fingerprint, find_detector
from hgdpo_core.stages.concept_latents import ConceptLatentStage, concept_latent_folder, has_word
from hgdpo_core.storage import Store
from hgdpo_core.storage.roots import default_root
from hgdpo_core.training.instantbooth import InstantBoothSettings
from hgdpo_core.training.request import TrainRequest, find_result
from hgdpo_core.training.trackers import check_tracker
from hgdpo_core.training.tune import Tuned


@dataclass(frozen=True)
class PersonaliseRun:
    """Checked inputs of one training. Cheap to hold: no tensors, no network."""

    config: PersonaliseConfig
    store: Store
    run_id: str
    target: Model
    images: ImageSet
    settings: InstantBoothSettings
    detector: Path | None
    """Weights of what finds faces; None for drawn ones."""
    command: str
    """Shell line that starts this training again."""

    @property
    def stage(self) -> ConceptLatentStage:
        """What the training reads of the images: latents, text embeddings and concepts."""
        config = self.config
        folder = concept_latent_folder(self.store, self.images, self.target, (config.width, config.height),
                                       detector_fingerprint(self.detector), self.settings.concept_word, config.crop)
        return ConceptLatentStage(self.images, folder, self.target, detector=self.detector)

    def request(self, *, copy_to_store: bool = False) -> TrainRequest:
        """The training of the adapter."""
        stage = self.stage
        return TrainRequest.of(NAME, self.target, stage.folder, stage.indices, self.settings,
                               copy_to_store=copy_to_store)

    def key(self, name: str) -> str:
        """Key of a file of this run, for example `runs/<run_id>/summary.json`."""
        return f"runs/{self.run_id}/{name}"


def open_personalise(preset: str = DEFAULT_PRESET, root: str | None = None, *, images: str | None = None,
                     target: str | None = None, run_id: str | None = None,
                     overrides: Mapping[str, Any] | None = None) -> PersonaliseRun:
    """Build the config, check root, target, images, image encoder and detector, and write `runs/<run_id>/config.json`.

    `run_id`: a finished run of the root, whose target, fine-tuned where it was, takes the adapter. What is None is the
    preset's. ConfigError, InputError, ModelError or StorageError name in one line what is wrong.
    """
    store = Store(default_root() if root is None else root)
    config = build_personalise_config(preset, target=target, images=images,
                                      finished=None if run_id is None else find_run_target(store, run_id))
    if overrides:
        config = apply_overrides(config, overrides)
    default_device()  # refuses a requested GPU that is not available
    check_tracker(config.instantbooth.tracker)
    model = find_model(config.target)
    word = config.instantbooth.concept_word
    check_trainable(model, word)
    settings = InstantBoothSettings.of(config.instantbooth)
    detector = find_detector(config.detector or (SOURCE if is_built_in(config.target.source) else None))
    store.check_writable()
    image_set = _read_images(config.images, store, word)
    identity = {**config.identity("run"), "image_encoder": settings.encoder_fingerprint}
    options = {"preset": preset, "root": store.root, "images": images, "target": target, "run": run_id}
    run = PersonaliseRun(config, store, f"personalise-{content_hash(identity)}", model, image_set, settings, detector,
                         shell_command("personalise", options, overrides or {}))
    store.write_json(run.key("config.json"), {"code_version": __version__, **config.model_dump(mode="json")})
    return run


def _read_images(source: str, store: Store, word: str) -> ImageSet:
    """The images, of which some have a caption with the concept's word; else InputError."""
    images = (read_image_set(str(find_people_images(store))) if is_built_in(source) else
              read_image_set(source, leave_out=store.local_path("")))
    if not any(has_word(caption or "", word) for caption in images.index["caption"].to_pylist()):
        raise InputError(f"none of the {len(images)} captions of {source} has the word {word}: expected it before the "
                         f'person, as in "a {word} woman, waving, in a park"; instantbooth.concept_word is another')
    return images


def plan_personalise(run: PersonaliseRun) -> list[dict[str, Any]]:
    """What a training would make and what exists, without making it."""
    stage = run.stage
    missing = stage.find_missing()
    made = not missing and find_result(run.request()) is not None
    return [{"stage": stage.title, "images": len(run.images), "shards": len(stage.indices),
             "missing_shards": len(missing)},
            {"stage": "adapter", "images": None, "shards": 1, "missing_shards": int(not made)}]


def encode_people(run: PersonaliseRun, runner: Runner = IN_PROCESS,
                  on: StageProgress = silent_stages) -> ConceptLatentStage:
    """Latents and concepts of the images, each with exactly one face; InputError where none is left."""
    stage = run.stage
    runner.make([stage], on)
    stage.refuse_if_empty()
    return stage


def train_adapter(run: PersonaliseRun, runner: Runner = IN_PROCESS, on: StageProgress = silent_stages,
                  on_training: OnTraining | None = None) -> Tuned:
    """The adapter, trained on what `encode_people` made; from the last checkpoint where there is one."""
    request = run.request(copy_to_store=runner.copy_to_store)
    with (on_training(request) if on_training else on(NAME)) as progress:
        return runner.train(request, progress)


def write_summary(run: PersonaliseRun, stage: ConceptLatentStage, adapter: Tuned,
                  times: StageTimes | None = None) -> dict[str, Any]:
    """`summary.json` in `runs/<run_id>/`; returns its content."""
    times, counts = times or StageTimes(), stage.counts()
    record = find_record(run.store, adapter.model_id)
    assert record is not None  # it was just made or found
    summary = {
        "preset": run.config.preset, "root": run.store.root, "run_id": run.run_id, "adapter_id": adapter.model_id,
        "fingerprint": record["fingerprint"], "target": run.config.target.source, **counts._asdict(),
        "steps": record["steps"], "final": adapter.log[-1], "timings": times.seconds, "found": times.cached,
        "command": run.command, "evaluate": evaluation_command(run, adapter),
        "artifacts": {"summary": run.store.url(run.key("summary.json")),
                      "adapter": run.store.url(f"models/{adapter.model_id}")}}
    run.store.write_json(run.key("summary.json"), summary)
    return summary


def evaluation_command(run: PersonaliseRun, adapter: Tuned) -> str:
    """The shell line that compares models with this adapter, but for the LoRA and, for the user's people, the folder.
    """
    drawn = is_built_in(run.config.images)
    options = {"preset": run.config.preset, "root": run.store.root, "target": run.config.target.source,
               "personaliser": adapter.path, "concepts": SOURCE if drawn else "PEOPLE", "tuned": "LORA"}
    crop = {} if drawn or run.config.crop == CROP else {"concepts.personaliser.crop": run.config.crop}
    return shell_command("evaluate", options, crop)
