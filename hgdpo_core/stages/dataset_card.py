"""README.md of a data set of triplets: what the Hugging Face hub, `datasets` and people read first."""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hgdpo_core import __version__
from hgdpo_core.config import UNKNOWN_LICENCE
from hgdpo_core.config.base import content_hash
from hgdpo_core.rendering.tables import Table
from hgdpo_core.statistics.distributions import summarise_scores, text_histogram
from hgdpo_core.storage import PARALLEL_REQUESTS, Store
from hgdpo_core.storage.shards import ShardFolder, ShardManifest

FEATURES = {"binary": "image", "string": "string", "double": "float64", "float": "float32", "int32": "int32",
            "int64": "int64", "bool": "bool"}
"""Arrow's types by the names that `datasets` has for them; all bytes of triplets are images."""


def render_card(triplets: ShardFolder, manifests: Sequence[ShardManifest], *, rows: int, rejected: int,
                licence: str, schema: pa.Schema) -> str:
    """The card of the shards that `manifests` name: licence, files, counts, scores, config.

    An existing card of the same shards is returned as it is: the scores would be read from every one of them.
    """
    stamp = f"<!-- {content_hash([__version__, licence, rejected, *(manifest.file for manifest in manifests)])} -->"
    existing = _read_card(triplets.store, triplets.key)
    if stamp in existing:
        return existing
    megabytes = sum(manifest.bytes for manifest in manifests) / 1e6
    return f"""{_front_matter(manifests, rows, licence, schema)}
{stamp}
# Preference triplets for Diffusion-DPO

Triplets (prompt, winner, loser), the best and the worst image of each pool. No human labelled anything: a scorer did.

- triplets: {rows:,}
- files: {len(manifests):,}, {megabytes:,.1f} MB
- pools without a pair, in `rejected/` with the reason: {rejected:,}

`jpg_0` is the winner and `jpg_1` the loser, as encoded bytes; `label_0` is 1.0 and `label_1` 0.0. These, `caption` and
the columns up to `are_different` are named as in Pick-a-Pic v2; ours stand behind them.

    datasets.load_dataset("path/or/hub-id/of/this/folder", split="train")              # images as bytes
    datasets.load_dataset("path/or/hub-id/of/this/folder", "images", split="train")    # decoded, as the Hub shows them
{_remote_line(triplets)}
## Scores
{_score_section(triplets, manifests)}
## How they were made
Licence: {licence}; `--set licence=...` sets another one. Whether images and prompts may be passed on depends on the
model that generated them and on where the prompts come from.

```json
{_settings(triplets)}
```
"""


@dataclass(frozen=True)
class PairFacts:
    """What the card of pairs that others labelled shows beside its folder's config."""

    name: str
    on_hub: bool
    revision: str
    licence: str
    read: int
    reasons: Mapping[str, int]
    """Why pairs are not used."""
    skipped: Mapping[str, int]
    """What else the source holds, by its kind."""
    warning: str
    """What its labels may hide."""


def render_pair_card(triplets: ShardFolder, manifests: Sequence[ShardManifest], facts: PairFacts, *, rows: int,
                     schema: pa.Schema) -> str:
    """The card of pairs of a public or own data set: source, licence, what was dropped and why, config."""
    config, megabytes = triplets.config, sum(manifest.bytes for manifest in manifests) / 1e6
    source = f"[{facts.name}](https://huggingface.co/datasets/{facts.name})" if facts.on_hub else f"`{facts.name}`"
    table = Table(("what became of the pairs", "pairs"), [
        *((f"dropped: {reason}", f"{count:,}") for reason, count in facts.reasons.items()), ("used", f"{rows:,}"),
        ("read", f"{facts.read:,}")])
    return f"""{_front_matter(manifests, rows, facts.licence, schema)}
# Preference pairs of {facts.name} for Diffusion-DPO

Triplets (prompt, winner, loser) from a data set that others made and labelled, filtered and scaled.

- source: {source}
- revision: `{facts.revision}`
- licence: {facts.licence}
- triplets: {rows:,}
- images: {config["width"]}x{config["height"]} pixels, scaled to cover that size and cropped at the centre
- files: {len(manifests):,}, {megabytes:,.1f} MB
- prompts: {"about people only" if config["human_only"] else "about anything"}, by version {config["filter_version"]} \
of the lists of words
{_licence_warning(facts)}{_label_warning(facts)}
`jpg_0` is the winner and `jpg_1` the loser, as encoded bytes; `label_0` is 1.0 and `label_1` 0.0. These, `caption` and
the columns up to `are_different` are named as in Pick-a-Pic v2; ours stand behind them. There are no scores and seeds.

    datasets.load_dataset("path/or/hub-id/of/this/folder", split="train")              # images as bytes
    datasets.load_dataset("path/or/hub-id/of/this/folder", "images", split="train")    # decoded, as the Hub shows them
{_remote_line(triplets)}
## What was used

{table.markdown()}

A pair counts under the first reason that is found; `rejected/` names each. Prompts that join a minor with a sexual word
are always dropped, whatever the settings, and are not copied.{_sexual_note(config)}{_skipped_note(facts)}

## How they were made

```json
{json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False)}
```
"""


def _licence_warning(facts: PairFacts) -> str:
    if facts.licence != UNKNOWN_LICENCE:
        return ""
    return (f"\n**Warning: no licence of {facts.name} is known.** Without one, its images and prompts, and what was\n"
            "made of them, may not be passed on: ask its authors before you publish this folder or a model trained on\n"
            "it.\n")


def _skipped_note(facts: PairFacts) -> str:
    if not facts.skipped:
        return ""
    return f" Not read: {', '.join(f'{count:,} {what}' for what, count in facts.skipped.items())}."


def _label_warning(facts: PairFacts) -> str:
    return f"\n**Warning: {facts.warning}.**\n" if facts.warning else ""


def _sexual_note(config: Mapping[str, Any]) -> str:
    return " Other sexual prompts were kept on request (`keep_sexual`)." if config["keep_sexual"] else ""


def _front_matter(manifests: Sequence[ShardManifest], rows: int, licence: str, schema: pa.Schema) -> str:
    """What the Hub reads: licence, size, files, columns."""
    files = "\n".join(f"      - {manifest.file}" for manifest in manifests)
    return f"""---
license: {licence}
pretty_name: Preference triplets for Diffusion-DPO
task_categories:
  - text-to-image
tags:
  - preference
  - dpo
size_categories:
  - {_size_category(rows)}
configs:
  - config_name: default
    default: true
    data_files:
{files}
  - config_name: images
    data_files:
{files}
dataset_info:
  - config_name: images
    features:
{_features(schema)}
---"""


def _features(schema: pa.Schema) -> str:
    """The columns of the configuration `images`, for the Hub's viewer; trainers read bytes, the default's."""
    return "\n".join(f"      - name: {field.name}\n        dtype: {FEATURES[str(field.type)]}" for field in schema)


def _remote_line(triplets: ShardFolder) -> str:
    """How to read them where they are, if others can reach that."""
    if triplets.store.local_path("") is not None:
        return ""
    files = f"{triplets.store.url(triplets.key)}/shard-*.parquet"
    return (f'    datasets.load_dataset("parquet", data_files="{files}", split="train")\n\n'
            "The last line reads them where they are, with the credentials of the environment. After stopped runs,\n"
            "`hgdpo gc` first removes the files that no manifest names.\n")


def card_licence(store: Store, key: str) -> str:
    """The licence in a data set's card; "unknown" without a card."""
    found = re.search(r"^license: (\S+)$", _read_card(store, key), re.MULTILINE)
    return found[1] if found else UNKNOWN_LICENCE


def _read_card(store: Store, key: str) -> str:
    return store.read_many([f"{key}/README.md"]).get(f"{key}/README.md", b"").decode(errors="replace")


def _size_category(rows: int) -> str:
    """As the hub sorts data sets."""
    limits = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    return next((name for limit, name in limits if rows < limit), "n>1M")


def _score_section(triplets: ShardFolder, manifests: Sequence[ShardManifest]) -> str:
    """Table and histograms of the winners' and losers' scores and of their difference."""
    def read(manifest: ShardManifest) -> pa.Table:
        return triplets.read_columns(manifest.index, ["winner_score", "loser_score"], manifest=manifest)

    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        tables = list(pool.map(read, manifests))
    if not any(table.num_rows for table in tables):
        return "There is no triplet.\n"
    winners, losers = (np.concatenate([table[name].to_numpy() for table in tables])
                       for name in ("winner_score", "loser_score"))
    both, difference = {"winner": winners, "loser": losers}, {"winner - loser": winners - losers}
    names = ("mean", "std", "min", "median", "max")
    rows = [(name, *(f"{getattr(summarise_scores(values), number):.3f}" for number in names))
            for name, values in {**both, **difference}.items()]
    return "\n".join([Table(("", *names), rows).markdown(), "", "```", text_histogram(both), "",
                      text_histogram(difference), "```", ""])


def _settings(triplets: ShardFolder) -> str:
    """The configs of the data set, its pool and its scores as JSON."""
    keys = {"triplets": triplets.key, **{name: triplets.config[name] for name in ("pool", "scores")}}
    texts = triplets.store.read_many(f"{key}/config.json" for key in keys.values())
    configs = {name: json.loads(texts[f"{key}/config.json"]) for name, key in keys.items()}
    return json.dumps(configs, indent=1, sort_keys=True, ensure_ascii=False)
