"""Ids of everything up to triplets, and of what is trained from given latents, made without loading a model.

Users' stores are found by these ids, so none of them may ever change. `ids.json` holds them as commit 42be5bc made
them; `python tests/golden/ids.py` prints them as they are now, for ids that are new.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

# Modules that may move: only these lines name them.
from hgdpo_core.ablate.arms import arm_config, base_arm
from hgdpo_core.ablate.measure import _arm_id as arm_id
from hgdpo_core.ablate.program import Shared, open_ablation
from hgdpo_core.config import (
    DpoConfig,
    EvaluationConfig,
    PoolConfig,
    PromptSource,
    SamplerConfig,
    ScorerConfig,
    SftConfig,
    TargetConfig,
    TripletConfig,
)
from hgdpo_core.config.base import apply_overrides
from hgdpo_core.config.presets import build_config, sd15
from hgdpo_core.evaluate import plan_evaluation
from hgdpo_core.image_sets import ImageSet, read_image_set
from hgdpo_core.models import Lora, Model, find_model
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.prompts import clean_prompts
from hgdpo_core.run import open_run
from hgdpo_core.run.comparison import open_comparison
from hgdpo_core.scorers import find_scorer
from hgdpo_core.stages.distances import distance_folder
from hgdpo_core.stages.features import feature_folder
from hgdpo_core.stages.image_latents import image_latent_folder
from hgdpo_core.stages.latents import latent_folder
from hgdpo_core.stages.pool import plan_pool
from hgdpo_core.stages.scores import score_folder, score_key, score_settings
from hgdpo_core.stages.triplets import model_fingerprint, triplet_folder
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.tune import tuned_id

LORA = Path(__file__).parent / "store" / "models" / "dpo-e1874abbd1e9" / "pytorch_lora_weights.safetensors"
Ids = dict[str, Any]

PLAIN = Model(path=Path("target"), fingerprint="a1" * 32, dtype="float32")
HALF_LORA = Lora(Path("lora"), 0.5, "b2" * 32)
MODELS = {
    "plain": PLAIN, "bfloat16": replace(PLAIN, dtype="bfloat16"), "clip_skip": replace(PLAIN, clip_skip=2),
    "negative": replace(PLAIN, negative_prompt="blurry, low quality"),
    "a1111": replace(PLAIN, prompt_syntax="a1111", negative_syntax="a1111"),
    "a1111 negative": replace(PLAIN, prompt_syntax="a1111", negative_syntax="a1111", negative_prompt="(blurry:1.3)"),
    "plain with a1111 negative": replace(PLAIN, negative_syntax="a1111", negative_prompt="(blurry:1.3)"),
    "lora": replace(PLAIN, lora=HALF_LORA), "whole lora": replace(PLAIN, lora=replace(HALF_LORA, weight=1.0)),
    "lora and all": replace(PLAIN, lora=HALF_LORA, clip_skip=1, negative_prompt="[bad]", prompt_syntax="a1111",
                            negative_syntax="a1111")}
SMALL = SamplerConfig(width=64, height=96, steps=4, guidance_scale=2.0)
POOL = PoolConfig(images_per_prompt=4, prompts_per_shard=2)
PROMPTS = ("a woman in a red top", "a man in a blue top", "Ein Mädchen, schwarzes Haar")
JUDGE = ScorerConfig(name="pickscore", source="figures")
FLOAT32 = {"images": None, "target.dtype": "float32"}
RUNS: dict[str, dict[str, Any]] = {
    "figures": {}, "tiny": {"prompts.limit": 3, "pool.images_per_prompt": 4, "pool.prompts_per_shard": 2},
    "flips": {"dpo.flip": True, "sft.flip": True}, "a1111": {"target.prompt_syntax": "a1111"},
    "negative": {"target.negative_prompt": "blurry"}, "clip_skip": {"target.clip_skip": 2},
    "latent_normalisation": {"sampler.latent_normalisation": True}, "triplets": {
        "triplets.pool_size": 5, "triplets.loser_rank": 4}, "validation": {"dpo.validation_every": 10},
    "workers": {"workers.open_runs": 7}, "licence": {"licence": "cc-by-4.0"}}
BY_GPUS = {"dpo.global_batch_size": None, "sft.global_batch_size": None}
"""sd15 as it was: the batch of a step, which it names now, depended on the number of GPUs."""



def all_ids(location: Path) -> Ids:
    """All of them by kind and case; `location` is an empty folder for a store and some files."""
    makers: dict[str, Callable[[Store], Ids]] = {
        "figures world": figures_ids, "runs": run_ids, "prompts": prompt_ids, "models": model_ids, "pools": pool_ids,
        "evaluation pools": evaluation_pool_ids, "scores": score_ids, "triplets": triplet_ids, "latents": latent_ids,
        "image latents": image_latent_ids, "images": image_set_ids, "features and distances": measured_ids,
        "trained": trained_ids, "comparisons": comparison_ids, "ablations": ablation_ids}
    with chdir(location):
        return {kind: make(Store(str(location / "store"))) for kind, make in makers.items()}


def figures_ids(store: Store) -> Ids:
    """What follows from the weights that come with the package."""
    target = find_model(TargetConfig(source="figures", dtype="float32"))
    return {"target": target.fingerprint, "target id": target.id,
            **{name: find_scorer(name, "figures") for name in ("pickscore", "inspector", "tinted")}}


def run_ids(store: Store) -> Ids:
    runs = {case: open_run("figures", store.root, overrides={**FLOAT32, **options}) for case, options in RUNS.items()}
    write_prompts("prompts.txt", "a woman in a red top\na man in a blue top\n")
    write_prompts("held-out.txt", "a girl with black hair\n")
    free = {**FLOAT32, "scorer.source": "figures", "evaluation.scorers": "pickscore=figures",
            "evaluation.prompts": {"source": "held-out.txt"}, "dpo.tracker": None, "sft.tracker": None, **BY_GPUS}
    runs["sd15"] = open_run("sd15", store.root, prompts="prompts.txt", target="figures", overrides=free)
    return {case: {"run": run.run_id, "prompts": run.prompts.id, "evaluation prompts": run.evaluation_prompts.id}
            for case, run in runs.items()}


def prompt_ids(store: Store) -> Ids:
    return {"three": clean_prompts(PROMPTS).id, "two": clean_prompts(PROMPTS[:2]).id,
            "turned": clean_prompts(PROMPTS[::-1]).id, "cleaned": clean_prompts(["", *PROMPTS, PROMPTS[0]]).id}


def model_ids(store: Store) -> Ids:
    lora = PLAIN.with_lora(LORA, 0.7)
    return {"kept lora": lora.id, "kept lora's file": fingerprint_path(LORA),
            **{case: [model.id, model_fingerprint(model.identity())] for case, model in MODELS.items()}}


def pool_ids(store: Store) -> Ids:
    def pool(model: Model, sampler: SamplerConfig, config: PoolConfig) -> str:
        return plan_pool(store, model, sampler, config, PROMPTS).pool_id

    paper, figures = sd15("target", "prompts.txt"), build_config("figures")
    settings = {"jpeg": POOL.model_copy(update={"image_format": "jpeg"}), "seed": POOL.model_copy(update={"seed": 7}),
                "batch": POOL.model_copy(update={"batch_size": 3})}
    normalised = SMALL.model_copy(update={"latent_normalisation": True})
    return {**{case: pool(model, SMALL, POOL) for case, model in MODELS.items()},
            **{case: pool(PLAIN, SMALL, config) for case, config in settings.items()},
            "latent_normalisation": pool(MODELS["lora"], normalised, POOL),
            "sd15": pool(MODELS["a1111"], paper.sampler, paper.pool),
            "figures": pool(PLAIN, figures.sampler, figures.pool)}


def evaluation_pool_ids(store: Store) -> Ids:
    def pool(model: Model, sampler: SamplerConfig, **settings: Any) -> str:
        config = EvaluationConfig(prompts=PromptSource(source="figures"), scorers=(JUDGE,), **settings)
        return plan_evaluation(store, model, sampler, POOL, config, PROMPTS).pool_id

    normalised = SMALL.model_copy(update={"latent_normalisation": True})
    return {**{case: pool(model, SMALL) for case, model in MODELS.items()},
            "several": pool(PLAIN, SMALL, images_per_prompt=2), "seed": pool(PLAIN, SMALL, seed=5),
            "syntax": pool(PLAIN, SMALL, prompt_syntax="a1111"), "normalised target": pool(PLAIN, normalised),
            "normalised lora": pool(MODELS["lora"], normalised)}


def score_ids(store: Store) -> Ids:
    names = ("pickscore", "hps_v2.0", "hps_v2.1", "imagereward", "aesthetic", "clip", "inspector", "tinted")
    scorers = {name: ScorerConfig.model_validate({"name": name}) for name in names}
    scorers["bfloat16"] = ScorerConfig(dtype="bfloat16")
    made = {case: score_key(score_settings("n4-0123456789ab", scorer, "c3" * 32)) for case, scorer in scorers.items()}
    built_in = (JUDGE, ScorerConfig(name="inspector", source="figures"), ScorerConfig(name="tinted", source="figures"))
    return made | {f"built-in {scorer.name}": score_folder(store, "n4-0123456789ab", scorer).key
                   for scorer in built_in}


def pool_and_scores(store: Store) -> tuple[ShardFolder, ShardFolder]:
    plan = plan_pool(store, PLAIN, SMALL, POOL, PROMPTS)
    return plan.folder, score_folder(store, plan.pool_id, JUDGE)


def triplet_ids(store: Store) -> Ids:
    cases = {"best and worst": TripletConfig(), "pool_size": TripletConfig(pool_size=3),
             "loser_rank": TripletConfig(loser_rank=2), "both": TripletConfig(pool_size=3, loser_rank=2)}
    return {case: triplet_folder(store, *pool_and_scores(store), clean_prompts(PROMPTS).id, config).key
            for case, config in cases.items()}


def triplets(store: Store) -> ShardFolder:
    return triplet_folder(store, *pool_and_scores(store), clean_prompts(PROMPTS).id, TripletConfig())


def latent_ids(store: Store) -> Ids:
    folder = triplets(store)
    return {case: [latent_folder(store, folder, model, (64, 96), flips=flips).key for flips in (False, True)]
            for case, model in MODELS.items() if model.lora is None}


def image_latent_ids(store: Store) -> Ids:
    images = ImageSet(address="images", id="4-0123456789ab", kind="folder", base="", files=(), index=pa.table({}))
    return {case: [image_latent_folder(store, images, model, (64, 96), flips=flips).key for flips in (False, True)]
            for case, model in MODELS.items() if model.lora is None}


def image_set_ids(store: Store) -> Ids:
    folder = Path("captioned")
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.png").write_bytes(f"the bytes of {name}".encode())
        (folder / f"{name}.txt").write_bytes(f"a caption of {name}".encode())
    return {"folder": read_image_set(str(folder.resolve())).id}


def measured_ids(store: Store) -> Ids:
    pool, scores = pool_and_scores(store)
    return {"features": feature_folder(store, "n4-0123456789ab", JUDGE).key,
            "distances": distance_folder(pool, scores, PLAIN).key,
            "distances of a1111": distance_folder(pool, scores, MODELS["a1111 negative"]).key}


def trained_ids(store: Store) -> Ids:
    """Of latents whose bytes are given: those that a machine makes have bytes of its own."""
    latents = latent_folder(store, triplets(store), PLAIN, (64, 96))
    manifests: Any = {index: SimpleNamespace(sha256=f"{index:064x}") for index in range(3)}
    paper, figures = apply_overrides(sd15("target", "prompts.txt"), BY_GPUS), build_config("figures")
    dpo: dict[str, DpoConfig] = {
        "sd15": paper.dpo, "figures": figures.dpo, "flip": DpoConfig(batch_size=2, learning_rate=1e-3, flip=True),
        "validation": paper.dpo.model_copy(update={"validation_every": 3, "validation_images": 1, "tracker": None}),
        "own noise": DpoConfig(batch_size=2, learning_rate=1e-3, share_noise=False, seed=3)}
    sft = {"sd15": paper.sft, "figures": figures.sft, "flip": paper.sft.model_copy(update={"flip": True}),
           "ema": SftConfig(batch_size=2, learning_rate=1e-5, ema_decay=0.999)}
    ids = {f"{kind} {case}": tuned_id(kind, PLAIN.identity(), latents, [0, 1, 2], config, manifests)
           for kind, cases in (("dpo", dpo), ("sft", sft)) for case, config in cases.items()}
    return ids | {"dpo some shards": tuned_id("dpo", PLAIN.identity(), latents, [0, 2], paper.dpo, manifests),
                  "dpo a1111": tuned_id("dpo", MODELS["a1111"].identity(), latents, [0], paper.dpo, manifests)}


def comparison_ids(store: Store) -> Ids:
    shutil.copyfile(LORA, "lora.safetensors")
    cases: dict[str, dict[str, Any]] = {
        "lora": {}, "weight": {"lora_weight": 0.5}, "weights": {"lora_weights": [0.25, 1.5]},
        "several": {"images_per_prompt": 2}, "scorers": {"scorers": ["pickscore"]},
        "base": {"target": "lora.safetensors", "base": "figures", "target_lora_weight": 0.3},
        "syntax": {"overrides": {"target.dtype": "float32", "evaluation.prompt_syntax": "a1111"}}}
    found: Ids = {}
    for case, options in cases.items():
        run = open_comparison(**{"root": store.root, "tuned": "lora.safetensors", "target": "figures",
                                 "overrides": {"target.dtype": "float32"}, **options})
        config = run.config
        found[case] = {"run": run.run_id, "prompts": run.evaluation_prompts.id, **{
            who: plan_evaluation(store, model, config.sampler, config.pool, config.evaluation, PROMPTS).pool_id
            for who, model in run.models.items()}}
    return found


def ablation_ids(store: Store) -> Ids:
    ablation = open_ablation("figures", store.root, overrides={**FLOAT32, **RUNS["tiny"]}, settings={
        "pool_sizes": (2, 4), "loser_ranks": (2, 4), "seeds": 2})
    config = ablation.run.config
    pool = plan_pool(store, PLAIN, config.sampler, config.pool, ablation.run.prompts.prompts)
    scores = score_folder(store, pool.pool_id, JUDGE)
    shared = Shared(ablation, PLAIN, pool, {"plain": scores, "tinted": scores}, pool, {"pickscore": scores})
    base = base_arm(config, 3, "plain")
    return {"ablation": ablation.ablation_id, "paper": open_ablation("figures", store.root,
                                                                     overrides=FLOAT32).ablation_id,
            "base": arm_id(shared, arm_config(config, base, 1), base),
            "arms": [arm_id(shared, arm_config(config, arm, 0), arm) for arm in ablation.arms]}


def write_prompts(name: str, text: str) -> None:
    Path(name).write_bytes(text.encode())


def flat(ids: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """("kind / case / part", id) of all."""
    items = ids.items() if isinstance(ids, dict) else enumerate(ids) if isinstance(ids, list) else None
    if items is None:
        yield name, ids
    else:
        for key, value in items:
            yield from flat(value, f"{name} / {key}" if name else str(key))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        found = all_ids(Path(temporary).resolve())
    sys.stdout.write(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
