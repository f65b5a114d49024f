"""The data of the report page, as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
from PIL import Image

from hgdpo_core.config import ComparisonConfig, RunConfig
from hgdpo_core.evaluate import Comparison
from hgdpo_core.rendering.grids import PairSample, PoolSample


@dataclass(frozen=True)
class ForeignPairs:
    """Pairs that others labelled, which a LoRA was trained on."""

    source: str
    """Which, in a sentence."""
    samples: Sequence[tuple[str, Image.Image, Image.Image]]
    """Prompt, winner and loser of the first few."""
    reasons: Mapping[str, int]
    """Why pairs were not used."""


@dataclass(frozen=True)
class ReportData:
    """The data of the page. Sections of empty or None fields are left out."""

    preset: str
    title: str
    config: RunConfig | ComparisonConfig
    root: str
    """URL or path of the object store; must not contain a secret, as it is printed."""
    created_at: datetime
    command: str
    """Shell line that starts this run again."""
    comparison: Comparison
    """The first scorer is that of the headline, and its scores are shown below the pairs."""
    counts: Mapping[str, int]
    """Shown in this order; underscores become spaces: prompts, pool_images, triplets, rejected, ..."""
    training_scorer: str | None = None
    """The scorer of the comparison that ranked the training pools: its win rate is no independent evidence."""
    sweep: Sequence[Comparison] = ()
    """The tuned LoRA at several weights, ascending."""
    pairs: Sequence[PairSample] = ()
    """A random sample of evaluation prompts, not a selection."""
    best_wins: Sequence[PairSample] = ()
    worst_losses: Sequence[PairSample] = ()
    pools: Sequence[PoolSample] = ()
    foreign: ForeignPairs | None = None
    people: Sequence[Mapping[str, Any]] = ()
    """Results of user studies of these images: contents of `studies/<id>/results.json`."""
    rank_distances: np.ndarray | None = None
    """Of pools' latents, as `read_distances` reads them: [pools, N - 1, 2]."""
    objective: str = "dpo"
    """Name of the one that trained the LoRA."""
    training_log: Sequence[Mapping[str, float]] = ()
    """Its rows: step, loss, grad_norm, learning_rate and those of the objective; a missing column has no chart."""
    sft_log: Sequence[Mapping[str, float]] = ()
    """Rows with step, loss, grad_norm, learning_rate."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage, in the order of the run."""
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Path or URL by name; http(s) URLs become links."""
    notes: Sequence[str] = ()
    """Remarks of one or two sentences each."""
    warnings: Sequence[str] = ()
    """Messages of the checks; shown directly below the headline."""
