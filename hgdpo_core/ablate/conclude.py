"""From the records of all arms to what a person reads: result.json, tables.md, plots and one page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from hgdpo_core import __version__
from hgdpo_core.ablate.arms import Arm, arm_labels
from hgdpo_core.ablate.charts import (
    colour_chart,
    distance_chart,
    pool_picture,
    weight_chart,
    weight_picture,
    win_rate_chart,
)
from hgdpo_core.ablate.claims import Claim, judge_claims
from hgdpo_core.ablate.measure import Diversity, measure_diversity, measure_rank_distances, prompt_colours, run_arm
from hgdpo_core.ablate.page import render_page
from hgdpo_core.ablate.program import Ablation, Shared, prepare_shared
from hgdpo_core.ablate.result import COLOURS, Results
from hgdpo_core.ablate.settings import World
from hgdpo_core.ablate.tables import TITLES, WORLDS, AblationTable, make_tables, plot_name
from hgdpo_core.built_in import SCORER_NOTE, is_built_in
from hgdpo_core.execution.runner import IN_PROCESS, Runner
from hgdpo_core.progress import StageProgress, silent_stages


def run_ablation(ablation: Ablation, stages: StageProgress = silent_stages,
                 runner: Runner = IN_PROCESS) -> dict[str, Any]:
    """The whole ablation, one arm after another; returns what `result.json` holds."""
    return conclude(prepare_shared(ablation, stages, runner), stages, runner)


def conclude(shared: Shared, stages: StageProgress = silent_stages, runner: Runner = IN_PROCESS) -> dict[str, Any]:
    """Measure what has not been measured yet, then write `ablations/<id>/`; returns what `result.json` holds."""
    results = gather(shared, stages, runner)
    claims = judge_claims(results)
    tables = make_tables(results, claims)
    pictures = draw_pictures(results, shared)
    store, key = shared.ablation.run.store, shared.ablation.key
    for name, (_, data) in pictures.items():
        store.write_bytes(key(f"plots/{name}.png"), data)
    notes = remarks(shared.ablation)
    head = "\n".join(["# HG-DPO ablations", "", *(f"- {note}" for note in notes), ""])
    text = "\n\n".join([f"{head}\n    {shared.ablation.command}", *(table.markdown() for table in tables)])
    store.write_bytes(key("tables.md"), f"{text}\n".encode())
    uris = {name: (title, "data:image/png;base64," + base64.b64encode(data).decode())
            for name, (title, data) in pictures.items()}
    store.write_bytes(key("index.html"), render_page(shared.ablation, tables, uris, notes).encode())
    result = {**summarise(results, claims, tables), "plots": list(pictures)}
    store.write_json(key("result.json"), result)
    return result


def gather(shared: Shared, stages: StageProgress, runner: Runner) -> Results:
    """The records of all arms with the target's colours, the diversity of Figure 8 and the distances of Figure 5b."""
    ablation = shared.ablation
    records = {arm: [run_arm(shared, arm, seed, stages, runner) for seed in ablation.seeds]
               for arm in ablation.arms}
    sweep = [row.arm for table in ablation.tables if table.number == "8" for row in table.rows]
    diversity: dict[Arm, list[Diversity]] = {
        arm: [measure_diversity(shared, arm, seed, stages, runner) for seed in ablation.seeds] for arm in sweep}
    target = measure_diversity(shared, None, 0, stages, runner) if sweep else None
    distances: dict[World, np.ndarray] = {
        world: measure_rank_distances(shared, world, stages, runner) for world in ablation.settings.worlds}
    return Results(ablation, records, prompt_colours(shared.target_images, ablation.run.evaluation_prompts.prompts),
                   target, diversity, distances)


def draw_pictures(results: Results, shared: Shared) -> dict[str, tuple[str, bytes]]:
    """Name -> title and PNG. Those that belong to a table have its `plot` as their name."""
    pictures: dict[str, tuple[str, bytes]] = {}
    for table in results.ablation.tables:
        chart = {"2": colour_chart, "8": weight_chart}.get(table.number, win_rate_chart)
        pictures[plot_name(table.number, table.world)] = (TITLES[table.number], chart(results, table))
        if table.number == "8":
            prompt = results.ablation.run.evaluation_prompts.prompts[0]
            pictures["figure-8-images"] = ("Figure 8: one prompt at several LoRA weights, seeds from left to right",
                                           _png(weight_picture(results, table, prompt)))
    worlds: tuple[World, ...] = results.ablation.settings.worlds
    for world in worlds:
        pictures[plot_name("5b", world)] = (f"Figure 5b, {WORLDS[world]}", distance_chart(results, world))
    for world in worlds:
        pictures[f"figure-6-{world}"] = (f"Figure 6: pools in their ranking, {WORLDS[world]}",
                                         _png(pool_picture(results, shared, world)))
    return pictures


def remarks(ablation: Ablation) -> list[str]:
    """What a reader must know before any number."""
    notes = []
    if any(is_built_in(scorer.source) for scorer in ablation.run.config.evaluation.scorers):
        notes.append(f"Where this says PickScore, {SCORER_NOTE}; the paper's numbers stand beside as the claim that is "
                     "tested, not as a value to reach.")
    if "tinted" in ablation.settings.worlds:
        notes.append("TINTED WORLD means: the pools were ranked by the same judge plus a stated fondness for warm "
                     "tints (scorers/tinted.py), made up to study colour shift. Its arms are compared with each other "
                     "only.")
    if ablation.run.config.scorer.name in {scorer.name for scorer in ablation.run.config.evaluation.scorers}:
        notes.append("The judge that ranks the pools is also among the judges of the evaluation: by it a win rate "
                     "shows that training reaches its aim, not that people agree.")
    return notes


def summarise(results: Results, claims: Sequence[Claim], tables: Sequence[AblationTable]) -> dict[str, Any]:
    """All numbers as plain JSON values; `tables` holds the texts of tables.md too."""
    ablation = results.ablation
    labels = arm_labels(ablation.tables)
    arms = [{"label": labels[arm], **asdict(arm), "triplets": seeds[0].triplets,
             "win_rate": {name: results.win_rate(arm, name).as_dict() for name in seeds[0].win_rate},
             "score_change": {name: results.score_change(arm, name).as_dict() for name in seeds[0].win_rate},
             "colour": {name: results.colour(arm, name).as_dict() for name in COLOURS},
             "diversity": value.as_dict() if (value := results.diversity_of(arm)) else None,
             "defects": {name: value.as_dict() for name in seeds[0].win_rate if (value := results.defects(arm, name))},
             "seeds": [record.model_dump(mode="json", exclude={"arm", "gains", "defects", "colours", "triplets"})
                       for record in seeds]}
            for arm, seeds in results.records.items()]
    target = results.diversity_of(None)
    return {
        "ablation_id": ablation.ablation_id, "code_version": __version__, "command": ablation.command,
        "root": ablation.run.store.root, "preset": ablation.run.config.preset,
        "evaluation_prompts": len(ablation.run.evaluation_prompts.prompts),
        "settings": ablation.settings.model_dump(mode="json"), "arms": arms,
        "target_diversity": target.as_dict() if target else None,
        "latent_distance": {world: {"pools": len(values), "means": values.mean(axis=0)[:, 0].tolist(),
                                    "deviations": values.mean(axis=0)[:, 1].tolist()}
                            for world, values in results.distances.items()},
        "claims": [{**asdict(claim), "estimate": claim.estimate.as_dict(), "verdict": claim.verdict}
                   for claim in claims],
        "tables": [table.as_dict() for table in tables],
        "artifacts": {name: ablation.run.store.url(ablation.key(file))
                      for name, file in (("page", "index.html"), ("tables", "tables.md"), ("plots", "plots"))}}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
