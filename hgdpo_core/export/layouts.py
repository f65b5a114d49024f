"""The folders of pairs that other trainers read: where images and captions are, and the file that names them.

Each trainer's own loading code was run on such a folder (docs/TRAINING.md, "Pairs for other trainers").
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

Size = tuple[int, int]
"""Width and height of an image."""


@dataclass(frozen=True)
class Layout:
    """What one trainer reads. Winner, loser and their captions have one name and lie in two flat folders."""

    title: str
    winners: str
    losers: str
    caption_suffix: str
    config_name: str
    render_config: Callable[[Path, str, Sequence[Size]], str]
    """From the folder, the name of the data set and the sizes of its images."""
    notes: str
    """For the folder's README.md: what reads it, what to set, which version that was found in."""


def _simpletuner_config(folder: Path, name: str, sizes: Sequence[Size]) -> str:
    """`multidatabackend.json`; a resolution of the type `area` is in megapixels: here the largest image's."""
    megapixels = max(width * height for width, height in sizes) / 1e6
    common = {"type": "local", "resolution": megapixels, "resolution_type": "area", "crop": False,
              "caption_strategy": "textfile"}
    winners, losers = f"{name}-winners", f"{name}-losers"
    return _json([
        {"id": winners, "dataset_type": "image", **common, "instance_data_dir": str(folder / "win"),
         "cache_dir_vae": f"cache/vae/{winners}", "conditioning_data": [losers]},
        {"id": losers, "dataset_type": "conditioning", "conditioning_type": "reference_strict", **common,
         "instance_data_dir": str(folder / "lose"), "cache_dir_vae": f"cache/vae/{losers}",
         "source_dataset_id": winners},
        {"id": f"{name}-text", "dataset_type": "text_embeds", "default": True, "type": "local",
         "cache_dir": f"cache/text/{name}"}])


def _onetrainer_config(folder: Path, name: str, sizes: Sequence[Size]) -> str:
    """`concepts.json`; patterns are relative to the path, without an ending they match any image file."""
    return _json([{"__version": 3, "name": name, "path": str(folder), "seed": 0, "enabled": True, "type": "STANDARD",
                   "include_subdirectories": True, "dpo_chosen_pattern": "chosen/{}",
                   "dpo_rejected_pattern": "rejected/{}", "text": {"prompt_source": "sample"}}])


def _kohya_config(folder: Path, name: str, sizes: Sequence[Size]) -> str:
    """`dataset_config.toml`; images of one size need no buckets, whose least side is 256."""
    width, height = sizes[0] if len(sizes) == 1 else (_side(sizes),) * 2
    quoted = json.dumps(str(folder / "pairs"), ensure_ascii=False)  # also a string of TOML
    return dedent(f"""\
        [[datasets]]
        resolution = [{width}, {height}]
        batch_size = 1
        enable_bucket = {"false" if len(sizes) == 1 else "true"}

          [[datasets.subsets]]
          image_dir = {quoted}
          caption_extension = ".caption"
          preference = true
        """)


def _side(sizes: Sequence[Size]) -> int:
    """The side of a square as large as the largest image."""
    return round(max(width * height for width, height in sizes) ** 0.5)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


LAYOUTS = {
    "simpletuner": Layout("SimpleTuner", "win", "lose", ".txt", "multidatabackend.json", _simpletuner_config, """\
SimpleTuner reads these pairs for Flow-DPO: `--data_backend_config` is `multidatabackend.json`, with
`--model_type=lora --distillation_method=flow_dpo`. It requires a flow-matching model: neither
Stable Diffusion 1.5 nor SDXL. Its caches go to `cache/` in the folder that it is started in.

Source: bghira/SimpleTuner, documentation/experimental/FLOW_DPO.md and simpletuner/helpers/multiaspect/sampler.py
(`get_conditioning_sample`), commit bc8e6ab of 2026-08-22."""),
    "onetrainer": Layout("OneTrainer", "chosen", "rejected", ".txt", "concepts.json", _onetrainer_config, """\
OneTrainer reads no pairs (commit 23df383 of 2026-08-19); its open pull request 1403 does, for LoRAs of most models:
check that branch out, take `concepts.json` as the concept file and switch DPO on (`rlhf_enabled`).

Source: Nerogar/OneTrainer, pull request 1403, modules/util/dpo_pattern_util.py and modules/dataLoader/dpo/, commit
8c664c7 of 2026-07-03. What is merged in the end may read other names."""),
    "kohya": Layout("kohya's sd-scripts", "pairs/w", "pairs/l", ".caption", "dataset_config.toml", _kohya_config, """\
sd-scripts reads no pairs (commit 48d368f of 2026-02-16; issue 1040 asks for it); its open pull request 1427 does: check
that branch out and start it with `--dataset_config dataset_config.toml` and, for Diffusion-DPO, `--beta_dpo`.

Source: kohya-ss/sd-scripts, pull request 1427, library/train_util.py (`DreamBoothDataset`), commit fb4eb3b of
2025-08-02. What is merged in the end may read other names."""),
}
"""Layout by the name of its option."""
