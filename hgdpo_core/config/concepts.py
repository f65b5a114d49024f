"""Settings of a personalised comparison: whose faces, which adapter, which judges of identity."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from hgdpo_core.built_in import SOURCE
from hgdpo_core.config.base import NO_ID, InIds, StageConfig, number

JUDGE_NAMES = ("sface", "arcface", "vggface", SOURCE)
CROP = 2.2
ON_HUB = InIds(result="never", run="changed")  # the fingerprint of the files enters


class PersonaliserConfig(StageConfig):
    """An adapter that reads a person's image (paper Section 5.4): a public IP-Adapter, or one trained here."""

    source: str = Field(description="an IP-Adapter for SD 1.5 as a .safetensors file or a hub id, or a folder that was "
                        'trained here; "figures" is built in')
    subfolder: Annotated[str, ON_HUB] = Field(default="models", description="of a hub id: folder of the adapter's file "
                                              "and of image_encoder, as diffusers' load_ip_adapter takes it")
    weight_name: Annotated[str, ON_HUB] = Field(default="ip-adapter-plus-face_sd15.safetensors",
                                                description="of a hub id: name of the adapter's file")
    revision: Annotated[str | None, ON_HUB] = Field(default=None, description="of a hub id: commit, branch or tag")
    image_encoder: str | None = Field(default=None, description="folder of the CLIP image encoder; default: "
                                      "image_encoder beside the adapter's file")
    strength: float | None = number("how much it changes images: scale of an IP-Adapter, beta of InstantBooth; "
                                    "default: 0.6 and 0.3", "none", default=None, ge=0, le=2)
    token_strength: float = number("factor of InstantBooth's concept token (alpha)", "none", default=0.4, ge=0, le=2)
    crop: float | None = number("side of the square that the adapter sees, in sides of the face's box; none: the whole "
                                "image, and no face is looked for", "none", default=CROP, ge=1, le=10)


class JudgeConfig(StageConfig):
    """A judge of identity; arcface and vggface need weights of the user's (docs/PERSONAL.md)."""

    name: str = Field(description=f"one of {', '.join(JUDGE_NAMES)}")
    source: str | None = Field(default=None, description="its weights: a file, or a folder that holds it")
    batch_size: Annotated[int, NO_ID] = number("faces per batch", "images", default=16, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        """`name` or `name=source`."""
        if not isinstance(value, str):
            return value
        name, _, source = value.partition("=")
        return {"name": name, "source": source or None}

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in JUDGE_NAMES:
            raise ValueError(f"there is no such judge of identity; there are {', '.join(JUDGE_NAMES)}")
        return name


class ConceptsConfig(StageConfig):
    """Which people, and how it is judged that they stay themselves (paper Table 4)."""

    source: str = Field(description="folder with one image per person, or a folder of images per person")
    personaliser: PersonaliserConfig
    images_per_concept: int | None = number("use only so many images of each person, the first by name", "images",
                                            default=None, ge=1)
    prompts_per_concept: int | None = number("use only so many of the prompts for each person, other ones for the next "
                                             "person; default: all", "prompts", default=None, ge=1)
    judges: tuple[JudgeConfig, ...] = Field(min_length=1, description='short: "sface,arcface=my/w600k_r50.onnx"')
    detector: str | None = Field(default=None, description='weights of the face detector YuNet: a file, or a folder '
                                 'that holds it; "figures" is built in, for drawn faces; default: the public ones, '
                                 "for the built-in target its own where no judge needs them")
    margin: float = number("identity counts as kept where the 90 % interval of its win rate is within 0.5 +- this; "
                           "fixed before the images are seen (ours)", "none", default=0.075, gt=0, lt=0.5)

    @field_validator("judges", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        """Several `name` or `name=source` in one string."""
        return value.split(",") if isinstance(value, str) else value
