"""The output of an ablation: result.json, tables.md, plots and one HTML page."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from hgdpo_core import __version__
from hgdpo_core.ablate import charts
from hgdpo_core.ablate.arms import WITH_DIVERSITY, Arm, arm_labels
from hgdpo_core.ablate.claims import Claim, evaluate_claims
from hgdpo_core.ablate.measure import Diversity, measure_diversity, measure_rank_distances, prompt_colours, run_arm
from hgdpo_core.ablate.personal import measure_personal
from hgdpo_core.ablate.program import Ablation, Shared, prepare_shared
from hgdpo_core.ablate.result import COLOURS, Results
from hgdpo_core.ablate.settings import World
from hgdpo_core.ablate.tables import TITLES, WORLDS, AblationTable, make_tables, plot_name
from hgdpo_core.built_in import SCORER_NOTE, is_built_in
from hgdpo_core.execution.runner import IN_PROCESS, Runner
from hgdpo_core.progress import StageProgress, silent_stages
from hgdpo_core.rendering.html import html_page

CHARTS = {"1": charts.baseline_chart, "1-weights": charts.baseline_chart, "2": charts.colour_chart,
          "8": charts.weight_chart}
WIDE = """
.scroll table { min-width: max-content; }
.plots { max-width: none; }
.plots img { width: auto; max-width: min(100%, 960px); }
section.plots img { max-width: 100%; }
"""


def run_ablation(ablation: Ablation, stages: StageProgress = silent_stages,
                 runner: Runner = IN_PROCESS) -> dict[str, Any]:
    """The whole ablation, one arm after another; returns what `result.json` holds."""
    return conclude(prepare_shared(ablation, stages, runner), stages, runner)


def conclude(shared: Shared, stages: StageProgress = silent_stages, runner: Runner = IN_PROCESS) -> dict[str, Any]:
    """Measure what is missing, then write `ablations/<id>/`; returns what `result.json` holds."""
    results = gather(shared, stages, runner)
    personal = measure_personal(shared, stages, runner) if shared.ablation.people else None
    claims = evaluate_claims(results)
    tables = make_tables(results, claims, personal)
    plots = make_plots(results, shared)
    store, key = shared.ablation.run.store, shared.ablation.key
    for name, (_, data) in plots.items():
        store.write_bytes(key(f"plots/{name}.png"), data)
    notes = remarks(shared.ablation)
    head = "\n".join(["# HG-DPO ablations", "", *(f"- {note}" for note in notes), ""])
    text = "\n\n".join([f"{head}\n    {shared.ablation.command}", *(table.markdown() for table in tables)])
    store.write_bytes(key("tables.md"), f"{text}\n".encode())
    store.write_bytes(key("index.html"), render_page(shared.ablation, tables, plots, notes).encode())
    result = {**summarise(results, claims, tables), "plots": list(plots),
              **({"personalised": personal.as_dict()} if personal else {})}
    store.write_json(key("result.json"), result)
    return result


def gather(shared: Shared, stages: StageProgress, runner: Runner) -> Results:
    """The records of all arms with the target's colours, the diversity of Figure 8 and the distances of Figure 5b."""
    ablation = shared.ablation
    records = {arm: [run_arm(shared, arm, seed, stages, runner) for seed in ablation.seeds]
               for arm in ablation.arms}
    sweep = [row.arm for table in ablation.tables if table.number in WITH_DIVERSITY for row in table.rows]
    diversity: dict[Arm, list[Diversity]] = {
        arm: [measure_diversity(shared, arm, seed, stages, runner) for seed in ablation.seeds] for arm in sweep}
    target = measure_diversity(shared, None, 0, stages, runner) if sweep else None
    distances: dict[World, np.ndarray] = {
        world: measure_rank_distances(shared, world, stages, runner) for world in ablation.settings.worlds
        if not shared.pool.pool.race}
    return Results(ablation, records, prompt_colours(shared.target_images, ablation.run.evaluation_prompts.prompts),
                   target, diversity, distances)


def make_plots(results: Results, shared: Shared) -> dict[str, tuple[str, bytes]]:
    """Name -> title and PNG. The plots of tables are named by their `plot`."""
    plots: dict[str, tuple[str, bytes]] = {}
    for table in results.ablation.tables:
        if table.number == "4":  # a row of numbers
            continue
        chart = CHARTS.get(table.number, charts.win_rate_chart)
        plots[plot_name(table.number, table.world)] = (TITLES[table.number], chart(results, table))
        if table.number == "8":
            prompt = results.ablation.run.evaluation_prompts.prompts[0]
            plots["figure-8-images"] = ("Figure 8: one prompt at several LoRA weights, seeds from left to right",
                                        _png(charts.weight_images(results, table, prompt)))
        if table.number == "1":
            plots["figure-17"] = ("Figure 17: one prompt by the target, HG-DPO and each baseline, seeds from left to "
                                  "right", _png(charts.baseline_images(results, table)))
    worlds: tuple[World, ...] = results.ablation.settings.worlds
    for world in results.distances:
        plots[plot_name("5b", world)] = (f"Figure 5b, {WORLDS[world]}", charts.distance_chart(results, world))
    for world in worlds:
        plots[f"figure-6-{world}"] = (f"Figure 6: ranked pools, {WORLDS[world]}",
                                      _png(charts.pool_images(results, shared, world)))
    return plots


def remarks(ablation: Ablation) -> list[str]:
    """Remarks on how to read the results."""
    notes, config = [], ablation.run.config
    if any(is_built_in(scorer.source) for scorer in config.evaluation.scorers):
        notes.append(f"Where this says PickScore, {SCORER_NOTE}; the paper's numbers are shown as the claims that are "
                     "tested, not as values to reach.")
    if "tinted" in ablation.settings.worlds:
        notes.append("TINTED WORLD means: the pools were ranked by the same scorer with an added preference for warm "
                     "tints (scorers/tinted.py), in order to study colour shift. Its arms are compared with each other "
                     "only.")
    if config.scorer.name in {scorer.name for scorer in config.evaluation.scorers}:
        notes.append("The scorer that ranks the pools is also among the scorers of the evaluation: its win rate shows "
                     "that training reaches its aim, not that people agree.")
    return notes


def render_page(ablation: Ablation, tables: Sequence[AblationTable], plots: Mapping[str, tuple[str, bytes]],
                notes: Sequence[str]) -> str:
    """The page as HTML. `plots`: name -> title and PNG; those that belong to no table follow at the end."""
    uris = {name: "data:image/png;base64," + base64.b64encode(data).decode() for name, (_, data) in plots.items()}
    sections = [table.section(f'<p class="plots"><img src="{uris[table.plot]}" alt="{escape(table.title)}, as a plot">'
                              "</p>" if table.plot in uris else "") for table in tables]
    sections += [f'<section class="plots"><h2>{escape(title)}</h2><img src="{uris[name]}" alt="{escape(title)}">'
                 "</section>\n" for name, (title, _) in plots.items() if name not in {table.plot for table in tables}]
    command = f"\n<section><h2>How to repeat</h2><pre><code>{escape(ablation.command)}</code></pre></section>\n"
    preset, items = ablation.run.config.preset, "".join(f"<li>{escape(note)}</li>" for note in notes)
    return html_page(
        f"HG-DPO ablations, preset {preset}", eyebrow=f"HG-DPO · ablations · preset {preset}",
        heading="The paper's comparisons from one pool",
        lead="The tables of arXiv:2405.20216v1 measured here, with the paper's numbers for comparison.",
        below=f'<ul class="notes">{items}</ul>', main="".join(sections) + command, style=WIDE)


def summarise(results: Results, claims: Sequence[Claim], tables: Sequence[AblationTable]) -> dict[str, Any]:
    """All results as plain JSON values; `tables` are those of tables.md."""
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
