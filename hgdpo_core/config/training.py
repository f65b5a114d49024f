"""Settings of the trainings: fine-tuning of the target, and each way to train its LoRA."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hgdpo_core.config.base import ADDED, NO_ID, OWN_TO_RUNS, InIds, StageConfig, number

MixedPrecision = Literal["auto", "no", "bf16", "fp16"]
Optimizer = Literal["adam8bit", "adamw"]
TrackerName = Literal["tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"]


class TrainingConfig(StageConfig):
    """Settings of both trainers."""

    epochs: int = number("passes over the data, unless max_steps is given", "epochs", default=1, ge=1)
    max_steps: int | None = number("length of the training; overrides epochs", "optimizer steps", default=None, ge=1)
    batch_size: int = number("batch of a process in a micro step", "samples (SFT) or pairs (DPO)", ge=1)
    gradient_accumulation_steps: int = number("how many make an optimizer step", "micro steps",
                                              default=1, ge=1)
    global_batch_size: Annotated[int | None, ADDED] = number(
        "batch of an optimizer step over all processes, whose number then changes no result and no id; default: "
        "batch_size x gradient_accumulation_steps x processes", "samples (SFT) or pairs (DPO)", default=None, ge=1)
    learning_rate: float = number("step size of the optimizer, constant after the warm-up", "none", gt=0, le=1)
    warmup_steps: int = number("how long the learning rate grows from 0", "optimizer steps", default=0, ge=0)
    weight_decay: float = number("decoupled weight decay of AdamW", "none", default=0.0, ge=0, le=1000)
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = number(
        "decay of Adam's averages: of gradients, of their squares", "none", default=(0.9, 0.999))
    max_grad_norm: float = number("longer gradients are clipped to it", "L2 norm", default=1.0, gt=0, le=1e12)
    optimizer: Optimizer = Field(default="adamw", description="adam8bit: AdamW with states of 8 bits, by bitsandbytes")
    mixed_precision: MixedPrecision = Field(
        default="auto", description="of the forward pass; auto: bf16 where it is fast, else fp16 on a GPU with tensor "
        "cores, else none. Weights stay float32")
    gradient_checkpointing: bool = Field(default=False, description="less memory, more time")
    flip: Annotated[bool, InIds(result="changed")] = Field(
        default=False, description="mirror half of the samples, chosen again each time; winner and loser of a pair "
        "together. Doubles the cached latents")
    seed: int = number("seed of order, noise, timesteps and new weights", "none", default=0, ge=0, lt=2**63)
    checkpoint_every: Annotated[int, OWN_TO_RUNS] = number(
        "distance of checkpoints", "optimizer steps", default=500, ge=1)
    log_every: Annotated[int, OWN_TO_RUNS] = number("distance of rows in the log", "optimizer steps", default=1, ge=1)
    validation_every: Annotated[int | None, OWN_TO_RUNS] = number(
        "distance of images for evaluation prompts; default: no such images", "optimizer steps", default=None, ge=1)
    validation_images: Annotated[int, OWN_TO_RUNS] = number(
        "how many images for evaluation prompts each time", "images", default=4, ge=1)
    tracker: Annotated[TrackerName | None, OWN_TO_RUNS] = Field(
        default=None, description="where training curves go besides the store's log.json; tensorboard writes beside it")


    @model_validator(mode="after")
    def _one_batch(self) -> Self:
        if self.global_batch_size is not None and self.gradient_accumulation_steps > 1:
            raise ValueError(f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, but it follows from "
                             f"global_batch_size ({self.global_batch_size}): change that, or set that to null")
        return self


class SftConfig(TrainingConfig):
    """Supervised fine-tuning of the whole UNet on the user's images (paper D.1)."""

    caption_dropout: float = number("fraction of captions that become empty (ours)", "none", default=0.1, ge=0, lt=1)
    ema_decay: Annotated[float | None, InIds(result="changed")] = number(
        "keep the average of the weights, as 0.9999; default: the last ones (ours)", "none", default=None, gt=0, lt=1)


class InstantBoothConfig(TrainingConfig):
    """Adapters for images of people beside a frozen target (arXiv:2304.03411); rates are ours, its own are lower."""

    learning_rate: float = number("step size of the optimizer for the adapters", "none", default=1e-5, gt=0, le=1)
    linear_learning_rate: float = number("that for the linear layers behind the image encoder", "none", default=1e-4,
                                         gt=0, le=1)
    gate_learning_rate: float = number("that for the gates: times max_steps it should be 0.3 or more, or they stay "
                                       "shut", "none", default=1e-3, gt=0, le=1)
    batch_size: int = number("images of a process together", "images", default=16, ge=1)
    max_steps: int | None = number("length of the training; overrides epochs", "optimizer steps", default=40_000, ge=1)
    image_encoder: Annotated[str | None, NO_ID] = Field(  # the fingerprint of its files enters
        default=None, description='a CLIP image encoder, which is frozen and kept with the adapter: folder or hub id; '
        '"figures" is built in')
    concept_word: str = Field(default="sks", description="the word before the person in captions and prompts; one "
                              "token, which nothing else uses")

    @model_validator(mode="after")
    def _no_flips(self) -> Self:
        if self.flip:
            raise ValueError("flip would mirror the image and not its concept, which is mirrored anyway: set it to "
                             "false")
        return self


class LoraConfig(TrainingConfig):
    """Training of a LoRA beside a frozen network."""

    lora_rank: int = number("rank of the LoRA; lora_alpha equals it, so its scale is 1 (ours)", "none", default=8, ge=1,
                           le=1024)
    autocast: Annotated[bool, ADDED] = Field(
        default=True, description="false, with mixed_precision bf16: the network computes in bf16 alone, norms too, "
        "which autocast keeps in float32. LoRA weights, losses and optimizer stay float32")

    @model_validator(mode="after")
    def _only_bf16_without_autocast(self) -> Self:
        if not self.autocast and self.mixed_precision != "bf16":
            raise ValueError(f"autocast is false, which is bf16 alone, but mixed_precision is {self.mixed_precision}: "
                             "set that to bf16, or autocast to true")
        return self


class WinnersConfig(LoraConfig):
    """Training of a LoRA on triplets, by supervised fine-tuning on the winners alone (paper Table 1)."""

    allow_foreign_triplets: bool = Field(default=False, description="train on triplets made by another model")


class DpoConfig(WinnersConfig):
    """Diffusion-DPO with the statistic matching loss on a LoRA (paper Eq. 9, D.2).

    `beta` is the paper's, for a loss of per-sample MEAN errors without a factor 1/2. The same number is `beta_dpo=2500`
    in diffusers' SD 1.5 example, and `beta_dpo=5000` where there is a factor 1/2 (Salesforce, diffusers' SDXL example).
    """

    beta: float = number(
        "beta of Eq. 9, for mean errors without a factor 1/2; larger stays closer to the target", "none",
        default=2500.0, gt=0, le=1e12)
    lambda_stat: float = number("weight of the statistic matching loss; 0 is off", "none", default=10_000.0, ge=0,
                                le=1e18)
    share_noise: bool = Field(default=True, description="winner and loser of a pair share their noise")


class AlignPropConfig(LoraConfig):
    """AlignProp on a LoRA (arXiv:2310.03739): the reward's gradient through the sampler. Ours, as the paper is silent.

    Images are sampled by DDIM in as many steps, and with the guidance and negative prompt, of the run's sampler.
    """

    epochs: int = number("passes over the prompts, unless max_steps is given", "epochs", default=1, ge=1)
    batch_size: int = number("images of a process sampled together", "images", default=4, ge=1)
    global_batch_size: int | None = number("images of an optimizer step, by all processes", "images", default=128, ge=1)
    max_steps: int | None = number("length of the training; overrides epochs", "optimizer steps", default=100, ge=1)
    learning_rate: float = number("step size of the optimizer, constant after the warm-up", "none", default=1e-3, gt=0,
                                  le=1)
    weight_decay: float = number("decoupled weight decay of AdamW", "none", default=1e-4, ge=0, le=1000)
    checkpoint_every: Annotated[int, OWN_TO_RUNS] = number(
        "distance of checkpoints", "optimizer steps", default=10, ge=1)
    live_steps: int | None = number(
        "last solver steps that the gradient goes through, K of DRaFT-K; default: drawn each optimizer step",
        "solver steps", default=None, ge=1)
    least_live_steps: int = number("where they are drawn: the least of them, uniform up to all", "solver steps",
                                   default=1, ge=1)
    reward_deviation: float = number("standard deviation of the reward over a pool; the loss is -reward / this, which "
                                     "max_grad_norm is meant for", "the reward's", default=1.0, gt=0)

    @model_validator(mode="after")
    def _no_flips(self) -> Self:
        if self.flip:
            raise ValueError("flip mirrors training images, of which AlignProp has none: set it to false")
        return self
