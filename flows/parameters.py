"""Every parameter of the commands and flows, defined once, for command lines and the forms of flows.

Imports neither Prefect nor torch. A flow's signature repeats names and types: `root: str | None = ROOT.field()`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from hgdpo_core.config.presets import DEFAULT_PRESET, INSTANTBOOTH, PRESETS, describe_presets

Kind = Literal["value", "flag", "switch", "repeated", "several", "settings", "position", "positions"]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a flow, and the command line option for it."""

    name: str
    help: str
    default: Any = None
    option: str = ""
    """On the command line, where it is not --name."""
    kind: Kind = "value"
    """flag: given or not; switch: --x or --no-x; repeated: an option each; several: values behind one option;
    position, positions: one value, or some, without an option."""
    read: Callable[[str], Any] | None = None
    """Parses the text; without it, the value is the text."""
    metavar: str | None = None
    choices: Sequence[str] | None = None
    suggested: Sequence[str] | None = None
    """What the form offers; the core checks any other value."""
    required: bool = False
    """On the command line; a form's fields may be left empty."""
    least: int | None = None
    form_help: str | None = None
    """In the form, where values are written in another way than on the command line."""

    def changed(self, **changes: Any) -> Self:
        """The same parameter with some differences, for another command."""
        return replace(self, **changes)

    def field(self) -> Any:
        """The default of a flow's parameter, with the description that the form shows."""
        from pydantic import Field

        shown: dict[str, Any] = {"enum": list(self.suggested)} if self.suggested else {}
        return Field(self.default, description=self.form_help or self.help, ge=self.least,
                     json_schema_extra=shown or None)

    def add_to(self, command: argparse.ArgumentParser) -> None:
        """Add the option to a command."""
        option = self.option or "--" + self.name.replace("_", "-")
        if self.kind in ("position", "positions"):
            number = {("position", True): None, ("position", False): "?", ("positions", True): "+",
                      ("positions", False): "*"}[self.kind, self.required]
            command.add_argument(self.name, nargs=number, help=self._help(), metavar=self.metavar)
            return
        settings: dict[str, Any] = {
            "value": {}, "flag": {"action": "store_true"}, "switch": {"action": argparse.BooleanOptionalAction},
            "settings": {"action": _AddSetting}, "repeated": {"action": "append"}, "several": {"nargs": "+"}}[self.kind]
        if self.kind not in ("flag", "switch"):
            settings |= {"type": self.read, "metavar": self.metavar, "choices": self.choices, "required": self.required}
        command.add_argument(option, dest=self.name, help=self._help(), default=self.default, **settings)

    def _help(self) -> str:
        shown = self.kind == "value" and self.default is not None
        return (self.help + (f"; default: {self.default}" if shown else "")).replace("%", "%%")


class _AddSetting(argparse.Action):
    """`--set name=value`, one more in the dict of them."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        name, separator, value = str(values).partition("=")
        if not separator:
            parser.error(f"argument {option_string}: {values!r} is not a setting: expected name=value, as "
                         "dpo.beta=1000")
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), name: _value_of(value)})


def _value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def read_numbers(text: str) -> list[float]:
    """0.25,0.5,1 as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.25,0.5,1") from None


def read_positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def read_port(text: str) -> int:
    """A TCP port, 0 for any free one."""
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def read_names(text: str) -> list[str]:
    """Names separated by commas."""
    return text.split(",")


# -- of several commands

PRESET = Parameter("preset", describe_presets(), DEFAULT_PRESET, suggested=tuple(PRESETS))
ROOT = Parameter("root", "folder or fsspec URL of all results; default: $HGDPO_ROOT, else output/full")
PROMPTS = Parameter("prompts", "txt, csv, tsv, jsonl or parquet, path or URL; or a data set; default: the preset's")
TARGET = Parameter("target", "your model: diffusers folder, .safetensors file or hub id; default: the preset's")
IMAGES = Parameter("images", "captioned images to fine-tune the model on first: a folder, or webdataset .tar or "
                   ".parquet files; path, URL or pattern")
OVERRIDES = Parameter("overrides", "a setting by its dotted name, as dpo.beta=1000 (hgdpo settings lists them); "
                      "repeatable", {}, option="--set", kind="settings", metavar="NAME=VALUE",
                      form_help='settings by their dotted names, as {"dpo.beta": 1000}; docs/SETTINGS.md lists them')
PLAN_ONLY = Parameter("plan_only", "show what would be made and what exists, and stop", False, option="--plan",
                      kind="flag")
PROBE = Parameter("probe", "with a plan: time a batch of each stage on this machine; this loads the models", False,
                  kind="switch")
SHARD_RUNNER = Parameter("shard_runner", "deployment: on the workers of `make up`, as shard runs that can be retried "
                         "one by one; in_process: here, in one process; auto: on workers if started by one, else here "
                         "in a process for each GPU", "auto",
                         choices=("auto", "in_process", "deployment"))

MAKE_STUDY = Parameter("study", "at the end, also make a user study of so many pairs of the two models' images; hgdpo "
                       "study serve asks people", read=read_positive, metavar="PAIRS", least=1)

INPUTS = (PRESET, ROOT, PROMPTS, TARGET, IMAGES, OVERRIDES)
RUN = (*INPUTS, MAKE_STUDY, PLAN_ONLY, PROBE, SHARD_RUNNER)

# -- of hgdpo evaluate

TUNED = Parameter("tuned", "the model to compare with the target: diffusers folder, .safetensors file, hub id, or a "
                  "LoRA (folder or .safetensors file)", metavar="MODEL", required=True)
EVALUATION_TARGET = TARGET.changed(help="diffusers folder, .safetensors file, hub id, or a LoRA on the base; default: "
                                   "the preset's", metavar="MODEL")
BASE = Parameter("base", "the model that LoRAs are applied to; default: the target", metavar="MODEL")
LORA_WEIGHT = Parameter("lora_weight", "weight of a LoRA; default: the preset's", read=float)
TARGET_LORA_WEIGHT = Parameter("target_lora_weight", "weight of the target's LoRA; default: lora_weight", read=float)
LORA_WEIGHTS = Parameter("lora_weights", "further weights to try the tuned LoRA at, as 0.25,0.5,1", read=read_numbers,
                         metavar="WEIGHT,...")
EVALUATION_PROMPTS = PROMPTS.changed(help="prompt file: txt, csv, tsv, jsonl or parquet, path or URL; default: the "
                                     "preset's held-out prompts")
EVALUATION_SCORERS = Parameter("scorers", "scorers by name, or name=source; default: the preset's", read=read_names,
                               metavar="NAME[=SOURCE],...")
IMAGES_PER_PROMPT = Parameter("images_per_prompt", "images per prompt and model; default: the preset's",
                              read=int)
CONCEPTS = Parameter("concepts", "people who agreed to it: a folder with an image of each, or a folder of images of "
                     "each; both models are personalised by one adapter (paper Table 4)", metavar="FOLDER")
PERSONALISER = Parameter("personaliser", "the adapter that reads the concepts: an IP-Adapter for SD 1.5, as a "
                         ".safetensors file with the folder image_encoder beside it or a hub id (h94/IP-Adapter), or "
                         "one that was trained here", metavar="FILE")
JUDGES = Parameter("judges", "judges of identity: sface, arcface=FILE, vggface=FILE; default: sface, for figures their "
                   "own", read=read_names, metavar="NAME[=FILE],...")
EVALUATE = (TUNED, EVALUATION_TARGET, BASE, EVALUATION_PROMPTS, EVALUATION_SCORERS, IMAGES_PER_PROMPT, LORA_WEIGHT,
            TARGET_LORA_WEIGHT, LORA_WEIGHTS, CONCEPTS, PERSONALISER, JUDGES, PRESET, ROOT, OVERRIDES, MAKE_STUDY,
            PLAN_ONLY, SHARD_RUNNER)

# -- of hgdpo personalise

PEOPLE_IMAGES = IMAGES.changed(help="images of people who agreed to it, one person each, with captions that have the "
                               "concept word before the person (a sks woman, waving): a folder, or webdataset .tar or "
                               ".parquet files; path, URL or pattern; default: the preset's")
ADAPTER_TARGET = TARGET.changed(help="the model that stays as it is: diffusers folder, .safetensors file or hub id; "
                                "default: the preset's", metavar="MODEL")
TARGET_RUN = Parameter("run_id", "take the target of this finished run, fine-tuned where it was, as the paper does",
                       option="--run", metavar="RUN")
ADAPTER_PRESET = PRESET.changed(suggested=tuple(INSTANTBOOTH))
PERSONALISE = (PEOPLE_IMAGES, ADAPTER_TARGET, TARGET_RUN, ADAPTER_PRESET, ROOT, OVERRIDES, PLAN_ONLY, SHARD_RUNNER)

# -- of hgdpo ablate

SEEDS = Parameter("seeds", "number of trainings per arm", 3, read=int, least=1)
WORLDS = Parameter("worlds", "plain: the run's own scorer ranks the pools; tinted: the same scorer with a bonus for "
                   "warm tints; default: both for a built-in scorer, plain otherwise", kind="several", metavar="WORLD")
COMPARISONS = Parameter("comparisons", "which tables and charts of the paper to measure: pool_size, loser_rank, "
                        "dataset_size, statistics, beta, lora_weight; default: these. Only by name: length "
                        "(of training), baselines (Table 1), personalised (Table 4)", kind="several", metavar="NAME")
SPLIT = Parameter("split", "built-in prompts to measure on: test, or validation to choose settings by", "test")
ABLATE = (*INPUTS, SEEDS, WORLDS, COMPARISONS, SPLIT, PLAN_ONLY, SHARD_RUNNER)

# -- of hgdpo rescore and score

SCORERS = Parameter("scorers", "scorers by name, or name=folder or hub id, on the command line repeatable; default: "
                    "the preset's, without a preset those of the root's runs", [], option="--scorer", kind="repeated",
                    metavar="NAME[=LOCATION]")
SCORERS_PRESET = PRESET.changed(help="take the scorers of this preset", default=None)
SCORERS_OVERRIDES = OVERRIDES.changed(help='settings of the preset by dotted name, as {"scorer.source": "folder"}; on '
                                      "the command line scorer.source=folder, repeatable")
VERIFY = Parameter("verify", "read every score again: corrupted ones go to quarantine and are made again", False,
                   kind="flag")
RESCORE = (ROOT, SCORERS, SCORERS_PRESET, SCORERS_OVERRIDES, VERIFY, PLAN_ONLY, SHARD_RUNNER)

# -- of the command line alone

PUBLISH = Parameter("publish", "also copy summary.json and report.html to this folder", metavar="FOLDER")
JSON = Parameter("json", "print a plan as JSON instead of a table", False, kind="flag")
SCORE = (ROOT, SCORERS, SCORERS_PRESET, SCORERS_OVERRIDES,
         Parameter("images", "an image, or a folder with metadata.jsonl or .txt captions; without it the pools of the "
                   "root are scored", kind="position"),
         Parameter("prompt", "what the images should show, instead of captions"),
         Parameter("csv", "also write the scores of image files to this file", metavar="FILE"))
CAPTION = (
    Parameter("images", "folder of image files, path or URL; existing captions stay as they are", required=True),
    Parameter("model", "LLaVA in transformers' format: folder or hub id; default: llava-hf/llava-1.5-7b-hf"),
    Parameter("prompt", "the question about each image", metavar="TEXT"),
    Parameter("batch_size", "batch size of the model", 8, read=read_positive),
    Parameter("max_new_tokens", "longest caption; the default is about what SD 1.5 reads", 75, read=read_positive),
    Parameter("dtype", "precision of the model; auto: bfloat16 where it is fast, else float32", "auto",
              choices=("auto", "float32", "bfloat16", "float16")),
    PLAN_ONLY.changed(help="show how many images lack a caption, and stop"))
EXPORT = (
    Parameter("run_id", "the run to export; default: the only finished run of the root", kind="position"),
    ROOT.changed(help="root of the run"),
    Parameter("to", "where to write; an existing README.md is kept", metavar="FOLDER", required=True),
    Parameter("fused", "also a whole pipeline with the LoRA merged in", False, kind="flag"),
    Parameter("target", "with --fused: where the target model is now, if it moved"),
    Parameter("push", "also upload to the Hugging Face Hub, privately; the token is the environment variable HF_TOKEN",
              metavar="OWNER/NAME"),
    Parameter("public", "with --push: visible to everyone", False, kind="flag"))
PAIRS = (
    Parameter("layout", "the trainer that reads the pairs", choices=("simpletuner", "onetrainer", "kohya"),
              required=True),
    Parameter("triplets", "key or id of the data set; default: the only finished one of the root"),
    ROOT.changed(help="root of the data set"),
    Parameter("to", "where to write: a new or empty folder, or one to continue", metavar="FOLDER", required=True),
    Parameter("limit", "write at most this many pairs; default: all", read=read_positive, metavar="N"))
STUDY = Parameter("study", "id of the study; default: the only one of the root", kind="position")
STUDY_SOURCES = Parameter("sources", "finished runs, evaluations (their two models are compared) or data sets of "
                          "triplets (their winners and losers are), by id; several: models that are compared on the "
                          "same prompts", [], kind="positions", metavar="SOURCE", required=True)
STUDY_ROOT = ROOT.changed(help="root of the sources; the study is written there")
PAIRS_ASKED = Parameter("pairs", "pairs of images, drawn at random", 40, read=read_positive, metavar="N", least=1)
PEOPLE = Parameter("people", "people who see each pair", 5, read=read_positive, metavar="N", least=1)
QUESTIONS = Parameter("questions", "most pairs that one person sees", 40, read=read_positive, metavar="N", least=1)
REPEATS = Parameter("repeats", "part of a person's pairs that are shown a second time, sides swapped", 0.05, read=float)
CHECKS = Parameter("checks", "attention checks, a picture beside its noise, as a part of a person's pairs", 0.05,
                   read=float)
FORCED_CHOICE = Parameter("forced_choice", "as in the paper: no answer \"cannot tell\"", False, kind="flag")
QUESTION = Parameter("question", "what people are asked about each pair", "Which image looks more natural?",
                     metavar="TEXT")
STUDY_SEED = Parameter("seed", "seed of the choice of pairs, their order and their sides", 0, read=int, least=0)
STUDY_CREATE = (STUDY_SOURCES, STUDY_ROOT, PAIRS_ASKED, PEOPLE, QUESTIONS, REPEATS, CHECKS, FORCED_CHOICE, QUESTION,
                STUDY_SEED)
STUDY_SERVE = (
    STUDY, ROOT.changed(help="root of the study"),
    Parameter("host", "address to listen on; 0.0.0.0: for other machines too", "127.0.0.1"),
    Parameter("port", "port to listen on; 0: any free one", 8321, read=read_port),
    Parameter("access_code", "ask for this code before a person takes part", metavar="CODE"),
    Parameter("log", "folder on this machine where answers are kept until the root has them; default: in the study's "
              "folder of a local root, else in the user's cache", metavar="FOLDER"))
STUDY_RESULTS = (
    STUDY, ROOT.changed(help="root of the study"),
    Parameter("half_width", "precision that is wanted of the win rates, for the number of further answers: half of the "
              "95 % interval, in percentage points", 5.0, read=float, metavar="POINTS"),
    Parameter("artifact", "also show the win rates as an artifact of the Prefect server", False, kind="flag"),
    JSON.changed(help="print the results as JSON instead of tables"))
STUDY_FORGET = (
    Parameter("participant", "code of the participant (behind # in their link), or its hash", kind="position",
              required=True),
    Parameter("study", "id of the study; default: the only one of the root", metavar="STUDY"),
    ROOT.changed(help="root of the study"),
    Parameter("log", "the server's --log, where it was given one", metavar="FOLDER"))
COLLECT = (ROOT, Parameter("dry_run", "list what would be deleted, and delete nothing", False, kind="flag"))

COMMAND_LINES: dict[str, tuple[Parameter, ...]] = {
    "run": (*RUN, PUBLISH, JSON), "plan": (*INPUTS, PROBE, JSON), "ablate": (*ABLATE, JSON),
    "evaluate": (*EVALUATE, PUBLISH, JSON), "personalise": (*PERSONALISE, JSON), "rescore": (*RESCORE, JSON),
    "score": SCORE, "caption": CAPTION, "export": EXPORT, "pairs": PAIRS, "settings": (PRESET,), "gc": COLLECT,
    "study create": STUDY_CREATE, "study serve": STUDY_SERVE, "study results": STUDY_RESULTS,
    "study forget": STUDY_FORGET}
"""Command -> its options: those of its flow, then those of the command line alone."""


def values_of(options: argparse.Namespace, parameters: Sequence[Parameter]) -> dict[str, Any]:
    """Name -> value of a command's options."""
    return {parameter.name: getattr(options, parameter.name) for parameter in parameters}
