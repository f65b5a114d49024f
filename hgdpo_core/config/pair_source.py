"""Where preference pairs that others labelled come from, and which of them are used."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hgdpo_core.config.base import InIds, StageConfig, number

PairFormat = Literal["auto", "parquet", "tars", "hpd", "json_lines"]
NAMED_BY_DATA_SET = InIds(result="never")
"""For what the data set's name, its resolved revision, the format found or the card stand for in ids of results."""


class PairSource(StageConfig):
    """Pairs in the form of Pick-a-Pic v2 (Parquet, webdataset tars), of HPD v2, or as JSON Lines beside images.

    Pairs whose prompt joins a word for a minor with a sexual one are always dropped; no setting keeps them.
    """

    source: Annotated[str, NAMED_BY_DATA_SET] = Field(
        min_length=1, description="hub id of a data set; folder, file or pattern of files at a path or URL")
    revision: Annotated[str | None, NAMED_BY_DATA_SET] = Field(
        default=None, description="commit, branch or tag of a hub id; its commit enters the id")
    split: str = Field(default="train", min_length=1, description="of a data set whose files are named by splits")
    subset: str | None = Field(default=None, description="folder of the data set, for one that has several")
    format: Annotated[PairFormat, NAMED_BY_DATA_SET] = Field(
        default="auto", description="parquet or tars: columns of Pick-a-Pic v2; hpd: {split}.json and {split}.tar.gz; "
        "json_lines: {prompt, winner, loser} beside image files; auto: what the files are")
    limit: int | None = number("read only so many, the first", "pairs", default=None, ge=1)
    sample_seed: int | None = number("draw those of `limit` at random by this seed; default: the first ones", "none",
                                     default=None, ge=0, lt=2**63)
    human_only: bool = Field(default=False, description="keep prompts about people, by a list of words (ours, for the "
                             "paper's \"only human images\")")
    keep_sexual: bool = Field(default=False, description="keep sexual prompts; those that name minors are dropped "
                              "all the same")
    size: Annotated[tuple[int, int] | None, NAMED_BY_DATA_SET] = number(
        "(width, height) of the images, as 512x512; default: the target's", "pixels", default=None)
    image_format: Literal["png", "webp", "jpeg"] = Field(
        default="png", description="of the scaled images in the store; png and webp are lossless, jpeg (quality 95) "
        "takes about a third")
    rows_per_shard: int = number("rows of the source for a shard, the unit that is committed or made again", "pairs",
                                 default=256, ge=1)
    licence: Annotated[str | None, NAMED_BY_DATA_SET] = Field(
        default=None, pattern=r"^[a-z0-9][a-z0-9.\-]*$",
        description="of the data set, as the Hugging Face hub names it; default: the one its hub page names")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """The source alone, where the other defaults suffice."""
        return {"source": value} if isinstance(value, str) else value

    @field_validator("size", mode="before")
    @classmethod
    def _size_from_text(cls, value: Any) -> Any:
        """`512x512`."""
        if not isinstance(value, str):
            return value
        width, _, height = value.lower().partition("x")
        return width.strip(), height.strip()

    @field_validator("size")
    @classmethod
    def _size_suits_a_vae(cls, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if size is not None and any(side < 8 or side % 8 for side in size):
            raise ValueError(f"size is {size[0]}x{size[1]}: expected multiples of 8, as 512x512")
        return size

    @model_validator(mode="after")
    def _sample_has_a_size(self) -> "PairSource":
        if self.sample_seed is not None and self.limit is None:
            raise ValueError("sample_seed draws `limit` pairs, but limit is not given: give it, or drop sample_seed")
        return self
