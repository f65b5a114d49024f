"""Settings of a user study: what is compared, who answers how much, and how."""

from pydantic import Field

from hgdpo_core.config.base import StageConfig, number


class StudyConfig(StageConfig):
    """People compare two images, one question after the other (paper Figure 3 and section E)."""

    sources: tuple[str, ...] = Field(
        min_length=1, description="what the pairs come from: evaluations, whose two models are compared, or a data set "
        "of triplets, whose winners and losers are; keys of the store")
    pairs: int = number("pairs of images, drawn at random by `seed`; fewer where the sources have fewer", "pairs",
                        default=40, ge=1)
    people: int = number("people who see each pair; the study is full once each pair has so many", "people", default=5,
                         ge=1)
    questions: int = number("most pairs that one person sees", "pairs", default=40, ge=1, le=1000)
    repeats: float = number("part of a person's pairs that are shown a second time, with sides swapped", "none",
                            default=0.05, ge=0, le=0.5)
    checks: float = number("attention checks, a picture beside its noise, as a part of a person's pairs", "none",
                           default=0.05, ge=0, le=0.5)
    forced_choice: bool = Field(default=False, description="as in the paper: no answer \"cannot tell\"")
    question: str = Field(default="Which image looks more natural?", min_length=1, max_length=200,
                          description="what people are asked about each pair")
    seed: int = number("seed of the choice of pairs, their order and their sides", "none", default=0, ge=0, lt=2**63)
