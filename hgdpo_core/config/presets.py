"""Named complete configurations. `figures` runs on a laptop; `sd15` carries the paper's numbers."""

from collections.abc import Callable

from hgdpo_core.config import (
    AlignPropConfig,
    DpoConfig,
    EvaluationConfig,
    InstantBoothConfig,
    PersonaliseConfig,
    PoolConfig,
    PromptSource,
    RunConfig,
    SamplerConfig,
    ScorerConfig,
    SftConfig,
    TargetConfig,
    TripletConfig,
    WorkersConfig,
)
from hgdpo_core.config.concepts import CROP
from hgdpo_core.errors import ConfigError, InputError

PAPER_SCORERS = ("hps_v2.0", "imagereward", "aesthetic", "clip")
"""The paper's scorers beside PickScore (Table 1)."""
PARTI_PROMPTS = "https://raw.githubusercontent.com/google-research/parti/main/PartiPrompts.tsv"


def figures(target: str | None = None, prompts: str | None = None) -> RunConfig:
    """Built in, on a CPU in minutes.

    The same code at 64x64 pixels, with settings that suit a small model. Guidance, prompts, steps, learning rate,
    beta and lambda were chosen on validation prompts (docs/EXPERIMENTS.md).
    """
    scorer = ScorerConfig(name="pickscore", source="figures", batch_size=64)
    inspector = ScorerConfig(name="inspector", source="figures", batch_size=64)  # never ranks a pool
    return RunConfig(
        preset="figures",
        prompts=PromptSource(source=prompts) if prompts else PromptSource(source="figures", split="train", limit=320),
        images=None if target else "figures",  # the preset's images belong to the preset's target
        target=TargetConfig(source=target or "figures"),
        sampler=SamplerConfig(width=64, height=64, steps=10, guidance_scale=1.5),
        sft=SftConfig(max_steps=60, batch_size=32, learning_rate=1e-4, warmup_steps=10, weight_decay=0.01,
                      checkpoint_every=30),
        pool=PoolConfig(images_per_prompt=20, prompts_per_shard=32, batch_size=40),
        scorer=scorer,
        triplets=TripletConfig(),
        dpo=DpoConfig(max_steps=60, batch_size=16, learning_rate=6e-4, warmup_steps=10, optimizer="adam8bit",
                      beta=1000.0, lambda_stat=1e6, checkpoint_every=30),
        alignprop=AlignPropConfig(max_steps=24, batch_size=16, global_batch_size=16, least_live_steps=2,
                                  checkpoint_every=8),
        evaluation=EvaluationConfig(prompts=PromptSource(source="figures", split="test", limit=512), lora_weight=1.0,
                                    scorers=(scorer, inspector)),
    )


def sd15(target: str | None = None, prompts: str | None = None) -> RunConfig:
    """The paper's settings for your own model and prompts.

    For a model of the SD 1.5 family at 704x1024 (arXiv:2405.20216v1, section 4 and D). Ours, not the paper's: warm-up,
    gradient clip, seeds, shard and batch sizes, bf16, SFT batch and caption dropout, validation images. Memory,
    measured on a CPU only: 5.1 GiB to sample one image, 6.3 for a DPO step of one pair with gradient checkpointing,
    14.6 for an SFT step of one image; batches that do not fit are halved.
    """
    target, prompts = _given("sd15", target, prompts)
    scorer = ScorerConfig(name="pickscore", batch_size=32)
    scorers = (scorer, *(ScorerConfig(name=name) for name in PAPER_SCORERS))
    return RunConfig(
        preset="sd15",
        prompts=PromptSource(source=prompts),
        target=TargetConfig(source=target, prompt_syntax="a1111", family="sd15"),
        sampler=SamplerConfig(width=704, height=1024, steps=50, guidance_scale=5.0),
        sft=SftConfig(batch_size=16, global_batch_size=16, learning_rate=1e-5, warmup_steps=500, weight_decay=0.01,
                      gradient_checkpointing=True, validation_every=500, tracker="tensorboard"),
        pool=PoolConfig(images_per_prompt=20, prompts_per_shard=16, batch_size=8),
        scorer=scorer,
        triplets=TripletConfig(),
        dpo=DpoConfig(batch_size=4, global_batch_size=16, learning_rate=1e-5, warmup_steps=100, beta=2500.0,
                      lambda_stat=10_000.0, lora_rank=8, optimizer="adam8bit", validation_every=500,
                      tracker="tensorboard"),
        evaluation=EvaluationConfig(prompts=PromptSource(source=PARTI_PROMPTS, column="Prompt", category="People"),
                                    lora_weight=0.5, scorers=scorers),
        # some 40 minutes of a GPU, some 10; the evaluation's few images by several GPUs
        workers=WorkersConfig(draw_images_per_run=960, score_images_per_run=19_200, least_draw_runs=4),
    )


def sdxl(target: str | None = None, prompts: str | None = None) -> RunConfig:
    """For your own model of the Stable Diffusion XL family, at 832x1216.

    The paper tuned no such model. Of sd15 are N, solver, lambda, batch of 16 pairs and LoRA weight; lambda was never
    tried on these latents, whose scale is another (0.13025): watch the colour shift. LoRA rank 8, learning rate 1e-5
    and beta 2500 are those of diffusers' SDXL DPO LoRA example (its beta_dpo 5000 has the factor 1/2), the learning
    rate of SFT, 1e-6, of its text-to-image example, and both examples' commands have 8-bit Adam and gradient
    checkpointing; the size is a bucket of SDXL's own training (arXiv:2307.01952).
    """
    target, prompts = _given("sdxl", target, prompts)
    base = sd15(target, prompts)
    return base.model_copy(update={
        "preset": "sdxl",
        "target": base.target.model_copy(update={"family": "sdxl"}),
        "sampler": base.sampler.model_copy(update={"width": 832, "height": 1216}),
        "sft": base.sft.model_copy(update={"batch_size": 4, "learning_rate": 1e-6, "optimizer": "adam8bit"}),
        "pool": base.pool.model_copy(update={"batch_size": 4}),
        "dpo": base.dpo.model_copy(update={"batch_size": 4, "gradient_checkpointing": True}),
        # three to four times the work per image
        "workers": base.workers.model_copy(update={"draw_images_per_run": 240}),
    })


INSTANTBOOTH: dict[str, InstantBoothConfig] = {
    "figures": InstantBoothConfig(
        max_steps=300, batch_size=32, learning_rate=1e-3, linear_learning_rate=1e-3, gate_learning_rate=1e-2,
        warmup_steps=30, mixed_precision="no", checkpoint_every=50, image_encoder="figures", concept_word="V"),
    "sd15": InstantBoothConfig(batch_size=4, global_batch_size=16, gradient_checkpointing=True, tracker="tensorboard",
                               image_encoder="openai/clip-vit-large-patch14")}
"""How each preset trains an adapter: sd15 with the batch of arXiv:2304.03411, with our rates and steps."""
FIGURES_CROP = 3.5  # the whole person, of whom the built-in concepts are cut out too


def _given(preset: str, target: str | None, prompts: str | None) -> tuple[str, str]:
    if target is None or prompts is None:
        missing = " and ".join(name for name, value in (("target", target), ("prompts", prompts)) if value is None)
        raise ConfigError(f"preset {preset} tunes your own model on your own prompts: give {missing}")
    return target, prompts


PRESETS: dict[str, Callable[[str | None, str | None], RunConfig]] = {"figures": figures, "sd15": sd15, "sdxl": sdxl}
"""Name -> the settings for a target and prompts; ConfigError where a preset needs what is None."""
DEFAULT_PRESET = "figures"


def describe_presets() -> str:
    """One line: every preset with what it is for."""
    lines = {name: (build.__doc__ or "").splitlines()[0] for name, build in PRESETS.items()}
    return "; ".join(f"{name}: {line[0].lower()}{line[1:].rstrip('.')}" for name, line in lines.items())


def build_config(preset: str, *, target: str | None = None, prompts: str | None = None,
                 images: str | None = None) -> RunConfig:
    """A preset with the user's model, prompts and images put in; ConfigError for an unknown name."""
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    config = PRESETS[preset](target, prompts)
    return config if images is None else config.model_copy(update={"images": images})


def build_personalise_config(preset: str, *, target: str | None = None, images: str | None = None,
                             finished: TargetConfig | None = None) -> PersonaliseConfig:
    """A preset's training of an adapter, for the user's model and images; `finished` is the target of a finished run.

    ConfigError for a preset without one, InputError where images or target are missing, or both targets are given.
    """
    if preset not in INSTANTBOOTH:
        raise ConfigError(f"preset {preset!r} trains no adapter of people; there are {', '.join(INSTANTBOOTH)}")
    if finished is not None and target is not None:
        raise InputError("target and run both name the model to train beside: leave one of them out")
    base = build_config(preset, target=finished.source if finished else target, prompts=PARTI_PROMPTS)
    built_in = preset == "figures"
    if images is None and not built_in:
        raise InputError("there are no images to train on: give images, captioned ones of people who agreed")
    return PersonaliseConfig(
        preset=preset, images=images or "figures", target=finished or base.target, width=base.sampler.width,
        height=base.sampler.height, crop=FIGURES_CROP if built_in else CROP, instantbooth=INSTANTBOOTH[preset],
        workers=base.workers)
