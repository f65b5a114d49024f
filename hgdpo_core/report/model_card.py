"""The model card of a tuned model: its files, data, results, limits, intended use and misuse.

What cannot be known from the run (the source of the images, consent, the licence) are fields to fill in by hand.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hgdpo_core.built_in import DATA_SET, FOREIGN_SOURCE, is_built_in
from hgdpo_core.config import UNKNOWN_LICENCE, RunConfig, TargetConfig
from hgdpo_core.models.backbone import DEFAULT_FAMILY
from hgdpo_core.models.files import looks_like_hub_id
from hgdpo_core.models.weight_files import WEIGHT_SUFFIXES
from hgdpo_core.rendering.parts import describe_rate, signed, signed_interval
from hgdpo_core.scorers import scorer_title
from hgdpo_core.training.objective import find_objective

TAGS = {"sd15": "stable-diffusion", "sdxl": "stable-diffusion-xl"}
FILE_PIPELINES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
EXAMPLE_PROMPT = "a woman with brown hair in a white top, smiling, in a park"
TO_FILL_IN = "TO FILL IN"
FIELDS = {
    "Made by, contact": "",
    "Licence of this model": "the target model's licence binds it too; write it at the top as well",
    "Source of the images the target was trained on": "",
    "Source of the images it was fine-tuned on (SFT)": "",
    "Consent of the people in those images, and rights to use them": "",
    "Rights to the foreign pairs, and who labelled them": "",
    "Known gaps of those images (ages, skin tones, body types, places)": "",
}
USE = """## Intended use

Generating images of people who do not exist, from text: profile pictures, entertainment, film and other creative work,
research on preference tuning.

## Misuse

A model that generates convincing people can be used to make malicious fakes, above all together with a personalised
text-to-image model, and can do significant harm to the people shown (arXiv:2405.20216v1, section F). Do not use it to
depict real people without their consent (give adapters that read faces only those of people who agreed), to deceive,
to harass, to make sexual images of anyone without consent or of minors at all, or to present its images as photographs.
It has no safety checker: add one before you offer it to others, and mark its images as generated.

## Limits

- Better images cost diversity: the higher the LoRA weight, the more alike the images of different seeds become, and
  the blurrier their backgrounds (section B.1; the paper uses weight 0.5).
- Fingers and other fine anatomy improve little: the scorer used in training hardly sees them (B.2).
- The preferences of the target model and of the scorer become stronger in this model, their biases included. A win rate
  by the scorer used in training shows that tuning reached its aim, not that people agree.
"""


def render_card(config: RunConfig, summary: Mapping[str, Any], *, kohya_name: str, fused: bool) -> str:
    """The card as Markdown with the Hub's front matter. Local paths are named by their last part only."""
    target = public_name(config.target.source)
    weight = summary["lora_weight"]
    tuned = config.images is not None
    parts = [
        _front_matter(config, summary, fine_tuned=tuned),
        f"# {target}, {_how(config, summary)}\n",
        f"A LoRA for {f'a fine-tuned {target}, which lies in `base/`' if tuned else target}, "
        f"{_made_by(config, summary)}.\n",
        "## Files\n",
        "- `pytorch_lora_weights.safetensors`: for diffusers, `pipeline.load_lora_weights(folder)`",
        f"- `{kohya_name}`: the same for AUTOMATIC1111, Forge and ComfyUI (put it among their LoRAs)",
        *(["- `base/`: the fine-tuned model, a whole diffusers pipeline. The LoRA was trained and evaluated on it; "
           f"on {target} itself its results differ"] if tuned else []),
        *([f"- `pipeline/`: a whole diffusers pipeline with the LoRA merged in at weight {weight:g}"] if fused else []),
        f"\nUse it at weight {weight:g}: all results below are at this weight.\n",
        _code(config, weight, {} if tuned else summary.get("scheduler", {}), fine_tuned=tuned),
        "## To be filled in before publishing\n", _fields(config),
        "## Data\n", _data(config, summary), "## Results\n", _results(summary), USE, *_colour_limit(config),
        "## Settings\n", f"```json\n{json.dumps(_settings(config), indent=1)}\n```",
    ]
    return "\n".join(parts) + "\n"


def _how(config: RunConfig, summary: Mapping[str, Any]) -> str:
    objective = find_objective(config.objective)
    if config.pairs is not None:
        return f"tuned on pairs of {summary['foreign_pairs']['data_set']} ({objective.title})"
    return f"tuned for better people ({objective.method or objective.title})"


def _made_by(config: RunConfig, summary: Mapping[str, Any]) -> str:
    objective = find_objective(config.objective)
    if config.pairs is not None:
        return f"made from preference pairs that others made and labelled, {_data_set(summary)}, by {objective.title}"
    return f"made without human labels {objective.made_by or f'by {objective.title}'}"


def _data_set(summary: Mapping[str, Any]) -> str:
    name = summary["foreign_pairs"]["data_set"]
    return f"[{name}](https://huggingface.co/datasets/{name})" if summary["foreign_pairs"]["on_hub"] else f"`{name}`"


def public_name(source: str) -> str:
    """A source as it may be printed: a hub id, a web address without its query, or the last part of a path."""
    if is_built_in(source):
        return "the built-in figures model"
    if source == FOREIGN_SOURCE:
        return "the built-in stand-in for a foreign model"
    address = urlsplit(source)
    if address.scheme in ("http", "https"):
        return f"{address.scheme}://{address.hostname}{address.path}"
    if looks_like_hub_id(source) and not Path(source).exists():
        return source
    return Path(address.path).name or "a local model"


def _front_matter(config: RunConfig, summary: Mapping[str, Any], *, fine_tuned: bool) -> str:
    name = config.objective.replace("_", "-")
    method = (name, "foreign-pairs") if config.pairs is not None else ("hg-dpo", name) if name == "dpo" else (name,)
    lines = ["license: unknown", "library_name: diffusers", "pipeline_tag: text-to-image", "widget:",
             f"- text: {EXAMPLE_PROMPT}", "tags:",
             *(f"- {tag}" for tag in ("lora", TAGS[_family(config)], "text-to-image", "diffusers", *method))]
    if config.pairs is not None and summary["foreign_pairs"]["on_hub"]:
        lines += ["datasets:", f"- {summary['foreign_pairs']['data_set']}"]
    source, name = config.target.source, public_name(config.target.source)
    if name == source and looks_like_hub_id(source) and not fine_tuned:  # else the LoRA's base is the one in base/
        lines.insert(0, f"base_model: {name}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _family(config: RunConfig) -> str:
    return config.target.family or DEFAULT_FAMILY


def _code(config: RunConfig, weight: float, scheduler: Mapping[str, Any], *, fine_tuned: bool) -> str:
    """How to open what was evaluated, its own VAE and configs included.

    `scheduler`: settings that a single file states and that diffusers does not read there.
    """
    target = TargetConfig(source="base") if fine_tuned else config.target
    single = target.source.endswith(WEIGHT_SUFFIXES)
    name = FILE_PIPELINES[_family(config)] if single else "DiffusionPipeline"
    revision = {"revision": f'"{target.revision}"'} if target.revision else {}
    configs = {"config": '"path/to/its/configs"'} if target.component_configs else {}
    vae = {"vae": _opening("AutoencoderKL", target.vae, "the/vae", {})} if target.vae else {}
    stated = "".join(f", {setting}={json.dumps(value) if isinstance(value, str) else value}"
                     for setting, value in scheduler.items())
    noise = [f"pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config{stated})"]
    lines = [
        f"from diffusers import {'AutoencoderKL, ' if vae else ''}{name}\n",
        f"pipeline = {_opening(name, target.source, 'the/target', {**revision, **configs, **vae})}.to(\"cuda\")",
        *(noise if stated else []),
        'pipeline.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors", adapter_name="hgdpo")',
        f'pipeline.set_adapters(["hgdpo"], [{weight:g}])',
        f'image = pipeline("{EXAMPLE_PROMPT}").images[0]']
    return "\n".join(["```python", *lines, "```\n"])


def _opening(name: str, source: str, shown: str, options: Mapping[str, str]) -> str:
    """The call that opens a model of diffusers; a path is shown as `path/to/...`."""
    load = "from_single_file" if source.endswith(WEIGHT_SUFFIXES) else "from_pretrained"
    given = [f'"{source if source == public_name(source) else f"path/to/{shown}"}"',
             *(f"{option}={value}" for option, value in options.items())]
    return f"{name}.{load}({', '.join(given)})"


def _fields(config: RunConfig) -> str:
    rows = [f"- **{name}**: {TO_FILL_IN}{f' ({hint})' if hint else ''}" for name, hint in FIELDS.items()
            if (config.images is not None or "SFT" not in name) and (config.pairs is not None or "pairs" not in name)]
    return "\n".join(rows) + "\n"


def _data(config: RunConfig, summary: Mapping[str, Any]) -> str:
    scorer, prompts = scorer_title(config.scorer.name), config.prompts.source
    raced = (f" (raced: only {config.pool.images_kept} of them were finished, the best and the worst by {scorer} part "
             "of the way)" if config.pool.race else "")
    if find_objective(config.objective).trains_on == "prompts":
        data = f"- No preference data: images were sampled during the training, and {scorer} was its reward."
    elif config.pairs is not None:
        data = _foreign_data(summary)
    else:
        data = (f"- Preference data: {summary['pool_images']:,} images drawn by the model itself, "
                f"{config.pool.images_per_prompt} a prompt{raced}, ranked by {scorer}; best against worst: "
                f"{summary['triplets']:,} pairs ({summary['rejected']:,} pools without one).")
    source = ("those of the pairs" if config.pairs is not None else
              f"the {DATA_SET}" if is_built_in(prompts) else public_name(prompts))
    lines = [
        data, f"- Prompts: {source}.",
        f"- {public_name(config.target.source)} was first fine-tuned on captioned images (see above for their source); "
        "the result lies in `base/`, and it is the target in everything below."
        if config.images is not None else "- The target was not fine-tuned on images first.",
    ]
    if summary["triplets"] and config.pairs is None and not config.dpo.allow_foreign_triplets:
        lines.append("- No photograph was used as a preference: winners and losers are the model's own images.")
    if is_built_in(config.scorer.source):
        lines.append(f"- {scorer} is here the figures setting's own judge, a small model trained on drawings: the "
                     "results on this card do not apply to photographs.")
    return "\n".join(lines) + "\n"


def _foreign_data(summary: Mapping[str, Any]) -> str:
    """Of the pairs: source, licence, what was used, what not and why."""
    facts = summary["foreign_pairs"]
    width, height = facts["image_size"]
    dropped = "; ".join(f"{count:,}: {reason}" for reason, count in facts["dropped"].items())
    people = ", prompts about people only (by a list of words)" if facts["human_only"] else ""
    text = (f"- Preference data: foreign pairs of {_data_set(summary)}, revision `{facts['revision']}`{people}: "
            f"{facts['used']:,} of {facts['read']:,} used{f' ({dropped})' if dropped else ''}; images scaled and "
            f"cropped to {width}x{height} pixels. Licence: {facts['licence']}.")
    if facts["licence"] == UNKNOWN_LICENCE:
        text += (" **Warning: no licence of these pairs is known.** Ask their authors before you publish this model: "
                 "without one, what was made of their images may not be passed on.")
    return text


def _colour_limit(config: RunConfig) -> list[str]:
    if config.objective != "dpo" or not config.dpo.lambda_stat:
        return []
    return ["- The statistic matching loss keeps the colours and costs a little of the improvement (B.3).\n"]


def _results(summary: Mapping[str, Any]) -> str:
    prompts = summary["evaluation_prompts"]
    lines = [f"Target model against tuned model on {prompts:,} held-out prompts, from the same seeds.\n"]
    for name, rate in summary["win_rate"].items():
        lines.append(f"- {scorer_title(name)}, win rate on the prompts it tells apart: {describe_rate(rate)}.")
    change = summary["colour_change"]
    shifts = (f"{channel} {_estimate(change[name], unit)}" for channel, name, unit in (
        ("hue", "hue_degrees", " degrees"), ("saturation", "saturation_percent", " %"),
        ("value", "value_percent", " %")))
    lines.append(f"- Colour shift: {'; '.join(shifts)}.")
    lines += [f"- Warning: {warning['message']}" for warning in summary.get("warnings", ())]
    return "\n".join(lines) + "\n"


def _estimate(estimate: Mapping[str, float | None], unit: str) -> str:
    value, low, high = (estimate[name] for name in ("value", "ci_low", "ci_high"))
    if value is None:
        return "not defined"
    interval = "" if low is None or high is None else f" (95 % interval {signed_interval(low, high, 1)})"
    return f"{signed(value, 1)}{unit}{interval}"


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings that made the model, without any path."""
    data = {"pool", "triplets"} if config.pairs is None else {"pairs"}
    settings = config.model_dump(mode="json", include={"preset", "sampler", "dpo", *data})
    if config.pairs is not None:
        settings["pairs"]["source"] = public_name(config.pairs.source)
    if config.objective != "dpo":
        settings["objective"] = config.objective
        settings[config.objective] = find_objective(config.objective).settings(config).model_dump(
            mode="json", exclude={"scorer"})
        del settings["dpo"]
    settings["target"] = config.target.model_dump(mode="json", include={"negative_prompt", "clip_skip", "dtype"})
    if config.target.vae is not None:
        settings["target"]["vae"] = public_name(config.target.vae)
    if config.images is not None:
        settings["sft"] = config.sft.model_dump(mode="json")
    return settings
