"""Scorers in the requests of shard runs: where another worker finds one, and that it is the planned one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hgdpo_core.config import ScorerConfig
from hgdpo_core.models import recorded_syntax
from hgdpo_core.models.locations import Location, refuse_other_model
from hgdpo_core.prompts.syntax import strip_syntax
from hgdpo_core.scorers import Scorer, find_scorer
from hgdpo_core.storage import Store


def locate_scorer(store: Store, scorer: ScorerConfig, *, copy_to_store: bool) -> dict[str, Any]:
    """Settings and location of a scorer, for `find_located_scorer` on another machine."""
    location = Location.of_source(store, scorer.source, copy_to_store=copy_to_store)
    return {"scorer": scorer.model_dump(mode="json"), "place": location.model_dump()}


def find_located_scorer(store: Store, recipe: Mapping[str, Any], fingerprint: str) -> ScorerConfig:
    """The scorer of a recipe; ModelError where it is another version than the planned one."""
    scorer, location = ScorerConfig.model_validate(recipe["scorer"]), Location.model_validate(recipe["place"])
    if location != Location():
        scorer = scorer.model_copy(update={"source": location.locate(store)})
    refuse_other_model(f"scorer {scorer.name}", find_scorer(scorer.name, scorer.source), fingerprint)
    return scorer


def scorer_version(scorer: ScorerConfig, fingerprint: str) -> dict[str, Any]:
    """All that decides a scorer's scores: its name, precision and weights."""
    settings = scorer.identity()
    return {"scorer": settings.pop("name"), **settings, "fingerprint": fingerprint}


def plain_scores(scorer: Scorer, model: Mapping[str, Any]) -> Callable[[Any, Sequence[str]], list[float]]:
    """Scores of images and prompts: without the weights and brackets that the model of this identity was given."""
    syntax = recorded_syntax(model)["prompt_syntax"]

    def score(images: Any, prompts: Sequence[str]) -> list[float]:
        return scorer.score(images, [strip_syntax(prompt, syntax) for prompt in prompts]).tolist()

    return score
