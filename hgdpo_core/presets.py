"""Named complete configurations. `figures` runs on a laptop; `sd15` carries the paper's numbers."""

from hgdpo_core.config import (
    DpoConfig,
    EvaluationConfig,
    PoolConfig,
    PromptSource,
    RunConfig,
    SamplerConfig,
    ScorerConfig,
    ScorerName,
    SftConfig,
    TargetConfig,
    TripletConfig,
    WorkersConfig,
)
from hgdpo_core.errors import ConfigError

PAPER_JUDGES: tuple[ScorerName, ...] = ("hps_v2.0", "imagereward", "aesthetic", "clip")
"""The paper's judges beside PickScore (Table 1)."""
PARTI_PROMPTS = "https://raw.githubusercontent.com/google-research/parti/main/PartiPrompts.tsv"


def figures() -> RunConfig:
    """The built-in world on a CPU in minutes: same code, 64x64 pixels, settings that suit a small model.

    Guidance, prompts, steps, learning rate, beta and lambda were chosen on validation prompts (docs/EXPERIMENTS.md).
    """
    judge = ScorerConfig(name="pickscore", source="figures", batch_size=64)
    inspector = ScorerConfig(name="inspector", source="figures", batch_size=64)  # never ranks a pool
    return RunConfig(
        preset="figures",
        prompts=PromptSource(source="figures", split="train", limit=320),
        images="figures",
        target=TargetConfig(source="figures"),
        sampler=SamplerConfig(width=64, height=64, steps=10, guidance_scale=1.5),
        sft=SftConfig(max_steps=60, batch_size=32, learning_rate=1e-4, warmup_steps=10, weight_decay=0.01,
                      checkpoint_every=30),
        pool=PoolConfig(images_per_prompt=20, prompts_per_shard=32, batch_size=40),
        scorer=judge,
        triplets=TripletConfig(),
        dpo=DpoConfig(max_steps=60, batch_size=16, learning_rate=6e-4, warmup_steps=10, optimizer="adam8bit",
                      beta=1000.0, lambda_stat=1e6, checkpoint_every=30),
        evaluation=EvaluationConfig(prompts=PromptSource(source="figures", split="test", limit=512), lora_weight=1.0,
                                    scorers=(judge, inspector)),
    )


def sd15(target: str | None = None, prompts: str | None = None) -> RunConfig:
    """The paper's settings (arXiv:2405.20216v1, section 4 and D) for a model of the SD 1.5 family at 704x1024.

    Ours, not the paper's: warm-up, gradient clip, seeds, shard and batch sizes, bf16, SFT batch and caption dropout,
    what is shown on the way. Memory, measured on a CPU only: 5.1 GiB to draw one image, 6.3 for a DPO step of one pair
    with gradient checkpointing, 14.6 for an SFT step of one image; batches that do not fit are halved.
    """
    if target is None or prompts is None:
        missing = " and ".join(name for name, value in (("target", target), ("prompts", prompts)) if value is None)
        raise ConfigError(f"preset sd15 tunes your own model on your own prompts: give {missing}")
    judge = ScorerConfig(name="pickscore", batch_size=32)
    judges = (judge, *(ScorerConfig(name=name) for name in PAPER_JUDGES))
    return RunConfig(
        preset="sd15",
        prompts=PromptSource(source=prompts),
        target=TargetConfig(source=target, prompt_syntax="a1111"),
        sampler=SamplerConfig(width=704, height=1024, steps=50, guidance_scale=5.0),
        sft=SftConfig(batch_size=16, learning_rate=1e-5, warmup_steps=500, weight_decay=0.01,
                      gradient_checkpointing=True, validation_every=500, tracker="tensorboard"),
        pool=PoolConfig(images_per_prompt=20, prompts_per_shard=16, batch_size=8),
        scorer=judge,
        triplets=TripletConfig(),
        dpo=DpoConfig(batch_size=4, learning_rate=1e-5, warmup_steps=100, beta=2500.0, lambda_stat=10_000.0,
                      lora_rank=8, optimizer="adam8bit", validation_every=500, tracker="tensorboard"),
        evaluation=EvaluationConfig(prompts=PromptSource(source=PARTI_PROMPTS, column="Prompt", category="People"),
                                    lora_weight=0.5, scorers=judges),
        # some 40 minutes of a GPU, some 10; the evaluation's few images by several GPUs
        workers=WorkersConfig(draw_images_per_run=960, score_images_per_run=19_200, least_draw_runs=4),
    )


def build_config(preset: str, *, target: str | None = None, prompts: str | None = None,
                 images: str | None = None) -> RunConfig:
    """A preset with the user's model, prompts and images put in; ConfigError for an unknown name."""
    if preset == "sd15":
        config = sd15(target, prompts)
    elif preset == "figures":
        config = figures()
    else:
        raise ConfigError(f"there is no preset {preset!r}; there are figures, sd15")
    changes: dict = {}
    if target is not None:
        changes["target"] = config.target.model_copy(update={"source": target})
        changes["images"] = None  # the preset's images belong to the preset's target
    if prompts is not None:
        changes["prompts"] = PromptSource(source=prompts)
    if images is not None:
        changes["images"] = images
    return config.model_copy(update=changes)
