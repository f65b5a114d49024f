"""One frozen, validated model per stage. Unknown or contradictory settings fail here, before any model loads.

Where a setting is the paper's, its docstring cites arXiv:2405.20216v1; METHOD-level choices of ours are marked "ours".
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from hgdpo_core.built_in import DATA_SET, SPLITS, is_any_built_in
from hgdpo_core.config.base import ADDED, NO_ID, OWN_TO_RUNS, IdOf, InIds, StageConfig, number
from hgdpo_core.config.concepts import CROP
from hgdpo_core.config.concepts import ConceptsConfig as ConceptsConfig
from hgdpo_core.config.concepts import JudgeConfig as JudgeConfig
from hgdpo_core.config.concepts import PersonaliserConfig as PersonaliserConfig
from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.config.training import AlignPropConfig, DpoConfig, SftConfig
from hgdpo_core.config.training import InstantBoothConfig as InstantBoothConfig
from hgdpo_core.config.training import LoraConfig as LoraConfig
from hgdpo_core.config.training import TrainingConfig as TrainingConfig
from hgdpo_core.config.training import WinnersConfig as WinnersConfig

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ImageFormat = Literal["png", "webp", "jpeg"]
PromptSyntax = Literal["plain", "a1111"]
Attention = Literal["native", "cudnn", "flash", "efficient"]
UNKNOWN_LICENCE = "unknown"


class PromptSource(StageConfig):
    """Where prompts come from: a file at a path or fsspec URL, a data set of the hub or a folder, built in."""

    source: str = Field(description='txt, csv, tsv, jsonl or parquet at a path or URL; hub id or folder of a data set; '
                                    '"figures" is built in, and "figures-foreign", of which some name no person')
    split: str = Field(default="train", description='of a data set; of built-in prompts train, validation or test')
    subset: str | None = Field(default=None, description="configuration of a data set that has several")
    column: str | None = Field(default=None, description="column of a table; default: prompt, Prompt, caption or text")
    category: str | None = Field(default=None, description="keep rows whose Category is this, as in PartiPrompts")
    limit: int | None = number("use only so many, the first", "prompts", default=None, ge=1)

    @model_validator(mode="after")
    def _split_exists(self) -> Self:
        if is_any_built_in(self.source) and self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}, but the {DATA_SET} has {', '.join(SPLITS)}")
        return self


class TargetConfig(StageConfig):
    """The user's model. Negative prompt and clip skip belong to it: the same in pool, training and evaluation.

    Captions of SFT images are plain, whatever the syntax of prompts: in descriptions brackets are text.
    """

    source: str = Field(description='hub id, diffusers folder, .safetensors or .ckpt file; "figures" is built in, and '
                        '"figures-foreign", a stand-in for the generators of public preference data')
    revision: str | None = Field(default=None, description="commit, branch or tag of a hub id")
    vae: str | None = Field(default=None, description="replaces the target's: diffusers folder, single file or hub id")
    component_configs: str | None = Field(
        default=None, description="diffusers folder with the component configs and tokenizer of a single file; "
                                  "default: those of its family, which come with this package")
    prediction_type: Annotated[Literal["epsilon", "v_prediction"] | None, ADDED] = Field(
        default=None, description="what the model of a single file predicts; default: as its keys say (v_pred, of "
        "SDXL), or NAME.yaml beside it, as A1111 and Forge read it, else its component configs")
    family: Annotated[str | None, NO_ID] = Field(
        default=None, description="sd15 or sdxl: a model of another family is refused; default: as its files say")
    negative_prompt: str = Field(default="", description="what guidance leads away from")
    clip_skip: int | None = number("last layers of the text encoder to skip: 1 is A1111's Clip skip 2; of SDXL, "
                                   "which skips one anyway, as many more", "layers", default=None, ge=1)
    dtype: Dtype = Field(default="auto", description="precision of sampling; auto: what the planning machine "
                         "does fast: bfloat16, on an older GPU float16, else float32, which a worker with a GPU "
                         "then refuses")
    prompt_syntax: PromptSyntax = Field(
        default="plain", description="how prompts and the negative prompt are written. plain: all characters are text, "
        "cut at 77 tokens. a1111: (words:1.2) and [words] weigh, \\( is a bracket, BREAK and long texts make chunks")


class SamplerConfig(StageConfig):
    """DPM-Solver++ multistep with classifier-free guidance (paper D.4)."""

    width: int = number("width of images, a multiple of 8", "pixels", default=704, ge=8, multiple_of=8)
    height: int = number("height of images, a multiple of 8", "pixels", default=1024, ge=8, multiple_of=8)
    steps: int = number("length of sampling", "solver steps", default=50, ge=1)
    guidance_scale: float = number("weight of classifier-free guidance; 1 is without", "none", default=5.0, ge=1.0)
    latent_normalisation: Annotated[bool, InIds(result="changed")] = Field(
        default=False, description="LAN (paper Eq. 7): a tuned model's latents keep the target's channel statistics; "
        "twice the cost of sampling")
    compile: Annotated[bool, ADDED] = Field(
        default=False, description="torch.compile of UNet and VAE decoder in channels_last, for pools and evaluations: "
        "minutes at a worker's first batch, then faster on a GPU. Needs a compiler on each worker; changes low bits")
    attention: Annotated[Attention, ADDED] = Field(
        default="native", description="kernel of attention that is tried first on a GPU, for pools and evaluations; "
        "native: torch's choice. Changes low bits")

    @property
    def plain(self) -> "SamplerConfig":
        """The same without latent normalisation: how a model without a LoRA is sampled."""
        return self.model_copy(update={"latent_normalisation": False})


class DrawingConfig(StageConfig):
    """How images are generated and stored, for pools and evaluations."""

    image_format: ImageFormat = Field(default="png", description="png and webp are lossless, jpeg is of quality 95")
    prompts_per_shard: int = number("prompts of a shard, the unit that is committed or made again", "prompts",
                                    default=32, ge=1)
    batch_size: Annotated[int, OWN_TO_RUNS] = number(
        "images sampled together; never changes which images are made", "images", default=8, ge=1)


class RaceCut(StageConfig):
    """A cut of a raced pool: all but a prompt's best and worst candidates, by their predicted images, end there."""

    after: int = number("when candidates are compared", "solver steps", ge=1)
    keep: int = number("how many of a prompt go on, half of them its best, half its worst", "images", ge=2)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """`after:keep`."""
        if not isinstance(value, str):
            return value
        after, _, keep = value.partition(":")
        return {"after": after.strip(), "keep": keep.strip()}

    def __str__(self) -> str:
        return f"{self.after}:{self.keep}"


class PoolConfig(DrawingConfig):
    """The pool of N candidates per prompt (paper Eq. 4)."""

    images_per_prompt: int = number("N of the paper", "images", default=20, ge=1)
    seed: int = number(
        "run seed; an image's own seed is derived from it, the prompt and the image's number", "none", default=0, ge=0,
        lt=2**63)
    steps: Annotated[int | None, InIds(result="never", run="changed")] = number(  # the pool's sampler has them
        "length of sampling in pools; default: sampler.steps, which evaluations always take", "solver steps",
        default=None, ge=1)
    race: Annotated[tuple[RaceCut, ...], ADDED] = Field(
        default=(), description='finish only candidates that will be ranked (ours): "5:6" keeps a prompt\'s 3 best '
        'and 3 worst after step 5, "4:10,7:4" cuts twice; default: finish all')

    @field_validator("race", mode="before")
    @classmethod
    def _split_cuts(cls, value: Any) -> Any:
        return [cut for cut in value.split(",") if cut.strip()] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _cuts_follow(self) -> Self:
        kept, done = self.images_per_prompt, 0
        for cut in self.race:
            if cut.after <= done or cut.keep >= kept:
                raise ValueError(f"race cuts after step {cut.after} to {cut.keep} of {kept} images: each cut must come "
                                 "after the one before, and keep fewer")
            kept, done = cut.keep, cut.after
        return self

    @property
    def images_kept(self) -> int:
        """Images of a prompt that are finished, all N without racing."""
        return self.race[-1].keep if self.race else self.images_per_prompt

    def sampler(self, sampler: SamplerConfig) -> SamplerConfig:
        """How candidates are sampled, where `sampler` is how evaluations are."""
        return sampler if self.steps is None else sampler.model_copy(update={"steps": self.steps})


class ScorerConfig(StageConfig):
    """A scorer of images."""

    name: str = Field(default="pickscore", description="aesthetic, clip, hps_v2.0, hps_v2.1, imagereward, inspector, "
                      "pickscore or tinted")
    source: Annotated[str | None, OWN_TO_RUNS] = Field(  # the fingerprint of what it names enters
        default=None, description="hub id, folder or weights file; default: the public weights of that name")
    batch_size: Annotated[int, OWN_TO_RUNS] = number("images scored together", "images", default=32, ge=1)
    dtype: Literal["float32", "tf32", "bfloat16", "float16"] = Field(
        default="float32", description="precision of the scorer; lower ones change scores and are faster on a GPU. "
        "tf32: float32 with factors of 10 bits, on GPUs from Ampere on")

    @field_validator("name")
    @classmethod
    def _is_listed(cls, name: str) -> str:
        from hgdpo_core.scorers import SCORERS  # it brings torch, which reading this module should not

        if name not in SCORERS:
            raise ValueError(f"there is no such scorer; there are {', '.join(sorted(SCORERS))}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        """`name` or `name=source`, where the other defaults suffice."""
        if not isinstance(value, str):
            return value
        name, _, source = value.partition("=")
        return {"name": name.strip(), "source": source.strip() or None}

    def __str__(self) -> str:
        return f"{self.name}={self.source}" if self.source else self.name


class TripletConfig(StageConfig):
    """Which two candidates of a pool become winner and loser (paper Eq. 6, Table 5)."""

    loser_rank: int | None = number("l of N-20-L-l: rank of the loser, from 1; default: last", "rank", default=None,
                                    ge=2)
    pool_size: Annotated[int | None, InIds(result="changed")] = number(
        "N of N-2, N-5, ...: rank only a pool's first N images; default: all", "images", default=None, ge=2)


class EvaluationConfig(StageConfig):
    """Target against trained model on held-out prompts, same seeds (paper Table 1)."""

    prompts: PromptSource = Field(description="held out: none of the training prompts")
    images_per_prompt: int = number("images per prompt by each model", "images", default=1, ge=1)
    seed: int = number("seed of the images, the same for both models", "none", default=1_000, ge=0, lt=2**63)
    lora_weight: float = number("scale of the LoRA at inference (paper A.3: 0.5)", "none", default=0.5, gt=0, le=100)
    prompt_syntax: PromptSyntax = Field(default="plain", description="how the evaluation's prompts are written")
    scorers: tuple[ScorerConfig, ...] = Field(min_length=1, description='short: "pickscore=my/folder,clip"')

    @field_validator("scorers", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        """Several `name` or `name=source` in one string."""
        return value.split(",") if isinstance(value, str) else value

    @model_validator(mode="after")
    def _scorers_differ(self) -> Self:
        names = [scorer.name for scorer in self.scorers]
        if len(set(names)) < len(names):
            raise ValueError(f"evaluation.scorers holds {', '.join(names)}: name each once, results go by name")
        return self


class WorkersConfig(StageConfig):
    """How work is divided among workers. It changes no result, so it is part of no id."""

    draw_images_per_run: int = number("how many one shard run generates", "images", default=1280, ge=1)
    score_images_per_run: int = number("how many one shard run scores or encodes", "images", default=6400, ge=1)
    least_draw_runs: int = number("least number that even few images are spread over", "shard runs", default=1, ge=1)
    open_runs: int = number(
        "how many of a stage wait or run at once, at least twice the workers; the next ones start as these end",
        "shard runs", default=50, ge=1)
    max_failed_shards: int = number(
        "how many of a stage may fail before no further one starts", "shard runs", default=10, ge=0)
    pending_seconds: float = number("a run that a worker took and did not start for so long is marked Crashed by its "
                                    "parent, where the automations did not do it", "seconds", default=1200.0, gt=0)


class RunConfig(StageConfig):
    """Everything one run needs, stored beside its results."""

    preset: str
    licence: str = Field(default=UNKNOWN_LICENCE, pattern=r"^[a-z0-9][a-z0-9.\-]*$",
                         description="of the triplets, as the Hugging Face hub names it: cc-by-4.0, other")
    prompts: PromptSource
    images: str | None = Field(default=None, description='captioned images for SFT: folder, .tar or .parquet files at '
                               'a path, URL or pattern; "figures" is built in')
    pairs: Annotated[PairSource | None, ADDED] = Field(
        default=None, description="train on pairs that others labelled (paper Table 1) instead of a pool of the "
        "target's own: hub id, folder, file or pattern")
    target: TargetConfig
    sampler: SamplerConfig
    sft: SftConfig
    pool: PoolConfig
    scorer: ScorerConfig
    triplets: TripletConfig
    objective: Annotated[str, ADDED] = Field(
        default="dpo", description="how the LoRA is trained: dpo, or a baseline of paper Table 1. alignprop: without a "
        "pool. sft_winners: on the winners alone, two for each pair of a batch, by what settings of dpo do not concern "
        "its loss")
    dpo: DpoConfig
    alignprop: AlignPropConfig = AlignPropConfig()
    evaluation: EvaluationConfig
    workers: Annotated[WorkersConfig, NO_ID] = WorkersConfig()

    def identity(self, of: IdOf = "result") -> dict[str, Any]:
        settings = super().identity(of)
        if self.objective != "alignprop":
            del settings["alignprop"]
        return settings

    @property
    def training_scorer(self) -> str | None:
        """Name of the evaluation scorer that the training follows too; None when the evaluation leaves it out.

        It ranks the pools, or is the reward; pairs that others labelled follow none.
        """
        if self.pairs is not None:
            return None
        training = (self.scorer.name, self.scorer.source)
        return next((s.name for s in self.evaluation.scorers if (s.name, s.source) == training), None)

    @model_validator(mode="after")
    def _ranks_exist(self) -> Self:
        rank, pool = self.triplets.loser_rank, self.pool.images_per_prompt
        if pool < 2:
            raise ValueError(f"pool.images_per_prompt is {pool}: a winner and a loser need at least 2")
        ranked = self.triplets.pool_size or pool
        if ranked > pool:
            raise ValueError(f"triplets.pool_size is {ranked}, but a pool holds only {pool} images: "
                             f"choose a size from 2 to {pool} or a larger pool.images_per_prompt")
        if rank is not None and rank > ranked:
            larger = "pool.images_per_prompt" if ranked == pool else "triplets.pool_size"
            raise ValueError(f"triplets.loser_rank is {rank}, but only {ranked} images of a pool are ranked: "
                             f"choose a rank from 2 to {ranked} or a larger {larger}")
        return self

    @model_validator(mode="after")
    def _race_ends(self) -> Self:
        if not self.pool.race:
            return self
        steps = self.pool.sampler(self.sampler).steps
        if self.pool.race[-1].after >= steps:
            raise ValueError(f"pool.race cuts after step {self.pool.race[-1].after}, but a pool is sampled in {steps} "
                             "steps: cut earlier")
        for name in ("loser_rank", "pool_size"):
            if getattr(self.triplets, name) is not None:
                raise ValueError(f"triplets.{name} needs whole pools, but of a raced one (pool.race) only "
                                 f"{self.pool.images_kept} images of a prompt are finished: leave one of them out")
        return self


class PersonaliseConfig(StageConfig):
    """An InstantBooth adapter, trained on images of people beside a frozen target (`hgdpo personalise`)."""

    preset: str
    images: str = Field(description='captioned images of one person each, who agreed: folder, .tar or .parquet files '
                        'at a path, URL or pattern; "figures" is built in')
    target: TargetConfig
    width: int = number("width that images are trained at, a multiple of 8", "pixels", ge=8, multiple_of=8)
    height: int = number("height that images are trained at, a multiple of 8", "pixels", ge=8, multiple_of=8)
    detector: str | None = Field(default=None, description='weights of the face detector YuNet: a file, or a folder '
                                 'that holds it; "figures" is built in, for drawn faces; default: the public ones, '
                                 "for the built-in target its own")
    crop: float = number("side of the square of an image that is its concept, in sides of the face's box", "none",
                         default=CROP, ge=1, le=10)
    instantbooth: InstantBoothConfig
    workers: Annotated[WorkersConfig, NO_ID] = WorkersConfig()


class ComparisonConfig(StageConfig):
    """Two models on the same prompts and seeds, without the rest of the pipeline."""

    preset: str
    target: TargetConfig = Field(description="a model, or a LoRA of `base`; its other settings apply to both")
    tuned: str = Field(description="what is compared with the target: a model, or a LoRA")
    base: str | None = Field(default=None, description="the model that the LoRAs are applied to; default: the target")
    target_lora_weight: float | None = Field(default=None, gt=0, description="for a LoRA; default: the tuned one's")
    lora_weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], ADDED] = Field(
        default=(), description="weights to try the tuned LoRA at, beside evaluation.lora_weight (paper Figure 8)")
    concepts: Annotated[ConceptsConfig | None, ADDED] = Field(
        default=None, description="people whose images condition both models beside the prompts (paper Table 4)")
    sampler: SamplerConfig
    pool: DrawingConfig
    evaluation: EvaluationConfig
    workers: Annotated[WorkersConfig, NO_ID] = WorkersConfig()
