"""A run, opened: everything a user can get wrong is checked here, in seconds, before any model loads."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hgdpo_core import __version__
from hgdpo_core.built_in import find_images, is_built_in
from hgdpo_core.config import RunConfig
from hgdpo_core.config.base import apply_overrides, content_hash
from hgdpo_core.config.presets import DEFAULT_PRESET, build_config
from hgdpo_core.devices import default_device
from hgdpo_core.errors import ConfigError
from hgdpo_core.evaluate import refuse_seen_prompts
from hgdpo_core.image_sets import ImageSet, read_image_set
from hgdpo_core.models import Model, find_model
from hgdpo_core.pair_sets import PairSet
from hgdpo_core.pair_sets.stand_ins import open_pairs
from hgdpo_core.prompts import PromptList, read_prompts, save_prompts
from hgdpo_core.prompts.syntax import check_syntax
from hgdpo_core.scorers import find_scorer, require_scorers
from hgdpo_core.storage import DryStore, Store
from hgdpo_core.storage.roots import default_root
from hgdpo_core.training.objective import lora_objective
from hgdpo_core.training.trackers import check_tracker


@dataclass(frozen=True)
class Run:
    """Checked inputs of one run. Cheap to hold: no tensors, no network."""

    config: RunConfig
    store: Store
    run_id: str
    target: Model
    prompts: PromptList
    evaluation_prompts: PromptList
    images: ImageSet | None
    command: str
    """Shell line that starts this run again."""
    pairs: PairSet | None = None
    """What its LoRA is trained on where others labelled it; None for a pool of its own."""

    @property
    def trains_on(self) -> Literal["pool", "pairs", "prompts"]:
        """A ranked pool of its own, pairs that others labelled, or prompts alone."""
        if lora_objective(self.config.objective).trains_on == "prompts":
            return "prompts"
        return "pool" if self.pairs is None else "pairs"

    @property
    def samples(self) -> tuple[str, ...]:
        """What evaluation images are generated for."""
        return self.evaluation_prompts.prompts

    def key(self, name: str) -> str:
        """Key of a file of this run, for example `runs/<run_id>/summary.json`."""
        return f"runs/{self.run_id}/{name}"


def open_run(preset: str = DEFAULT_PRESET, root: str | None = None, *, prompts: str | None = None,
             target: str | None = None, images: str | None = None,
             overrides: Mapping[str, Any] | None = None, dry: bool = False) -> Run:
    """A checked run, with `runs/<run_id>/config.json` and its lists of prompts written; errors as `resolve_run`.

    `dry`: nothing is written to the root, for a plan.
    """
    run = resolve_run(preset, root, prompts=prompts, target=target, images=images, overrides=overrides, dry=dry)
    save_prompts(run.store, run.prompts)
    save_prompts(run.store, run.evaluation_prompts)
    run.store.write_json(run.key("config.json"), {"code_version": __version__, **run.config.model_dump(mode="json")})
    return run


def resolve_run(preset: str = DEFAULT_PRESET, root: str | None = None, *, prompts: str | None = None,
              target: str | None = None, images: str | None = None,
              overrides: Mapping[str, Any] | None = None, dry: bool = False) -> Run:
    """Build the config, check root, prompts, images, target and scorers; leaves no trace of a run in the root.

    `dry`: write nothing to the root, for a plan. ConfigError, InputError, ModelError or StorageError name in one line
    what is wrong; nothing is lost or half made.
    """
    config = build_config(preset, target=target, prompts=prompts, images=images)
    if overrides:
        config = apply_overrides(config, overrides)
    store = (DryStore if dry else Store)(default_root() if root is None else root)
    default_device()  # refuses a requested GPU that is not available
    training, evaluation = read_prompts(config.prompts, store), read_prompts(config.evaluation.prompts, store)
    check_syntax([config.target.negative_prompt, *training.prompts], config.target.prompt_syntax)
    check_syntax(evaluation.prompts, config.evaluation.prompt_syntax)
    refuse_seen_prompts(evaluation.prompts, training.prompts)
    objective = lora_objective(config.objective)
    objective.check(config)
    if config.pairs is not None and objective.trains_on == "prompts":
        raise ConfigError(f"objective is {config.objective}, which is trained on prompts, but pairs are given: drop "
                          "one of them")
    check_tracker(objective.settings(config).tracker)
    model = find_model(config.target)
    find_scorer(config.scorer.name, config.scorer.source)
    require_scorers(config.evaluation.scorers)
    store.check_writable()
    image_set = _read_images(config.images, store)
    pairs = open_pairs(config.pairs, store) if config.pairs is not None else None
    if image_set is not None:
        check_tracker(config.sft.tracker)
    options = {"preset": preset, "root": store.root, "prompts": prompts, "target": target, "images": images}
    command = shell_command("run", options, overrides or {})
    run_id = f"{preset}-{content_hash(config.identity('run'))}"
    return Run(config, store, run_id, model, training, evaluation, image_set, command, pairs)


def shell_command(verb: str, options: Mapping[str, object], overrides: Mapping[str, Any]) -> str:
    """The line that starts a command again: `hgdpo <verb> --option value --set name=value`."""
    words = [f"hgdpo {verb}"]
    words += [f"--{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    words += [f"--set {shlex.quote(f'{name}={json.dumps(value)}')}" for name, value in overrides.items()]
    return " ".join(words)


def _read_images(source: str | None, store: Store) -> ImageSet | None:
    if source is None:
        return None
    if is_built_in(source):
        return read_image_set(str(find_images(store)))
    return read_image_set(source, leave_out=store.local_path(""))
