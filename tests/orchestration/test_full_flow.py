"""The whole flow on tiny models and a real Prefect server: made once, found the second time."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from events import sent_events
from faulty_s3 import served_bucket
from pair_files import pair, write_parquet
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterId
from safetensors.torch import load_file
from study_cases import answers, joined

from flows.cli import main
from flows.full import hgdpo
from flows.study import hgdpo_study
from hgdpo_core.errors import InputError
from hgdpo_core.storage import Store
from hgdpo_core.study.session import StudySession
from hgdpo_core.study.study import open_study
from tasks.assets import MATERIALIZED


@pytest.fixture(scope="module")
def parameters(tmp_path_factory, target_folder, judge_folder):
    from hgdpo_core.figures.dataset import write_image_folder

    folder = tmp_path_factory.mktemp("user")
    (folder / "prompts.txt").write_text("".join(f"a woman in a red top, number {i}\n" for i in range(6)))
    (folder / "held-out.txt").write_text("".join(f"a man in a blue top, number {i}\n" for i in range(8)))
    write_image_folder(folder / "images", 4, seed=0)
    scorer = {"name": "pickscore", "source": str(judge_folder)}
    return {
        "root": str(folder / "root"), "target": str(target_folder), "prompts": str(folder / "prompts.txt"),
        "images": str(folder / "images"),
        "overrides": {
            "target.dtype": "float32", "scorer.source": str(judge_folder), "evaluation.scorers": [scorer],
            "evaluation.prompts": {"source": str(folder / "held-out.txt")}, "sampler.width": 32, "sampler.height": 32,
            "sampler.steps": 2, "pool.images_per_prompt": 3, "pool.prompts_per_shard": 4, "sft.max_steps": 2,
            "sft.batch_size": 2, "dpo.max_steps": 2, "dpo.batch_size": 2, "dpo.learning_rate": 5e-2,
            "dpo.warmup_steps": 0, "licence": "cc-by-4.0"}}


@pytest.fixture(scope="module")
def summary(server, parameters):
    return hgdpo(**parameters)


def test_the_summary_keeps_its_contract(summary, parameters):
    assert set(summary) >= {"preset", "root", "win_rate", "colour_shift", "lora_weight", "triplets", "pool_images",
                            "timings", "artifacts", "warnings", "score_change", "defect_rate", "colour_change"}
    assert summary["warnings"] == []  # two steps are too few for any check
    with get_client(sync_client=True) as client:
        run = next(run for run in client.read_flow_runs() if run.name.endswith(summary["run_id"]))
        artifacts = client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
    assert run.name == f"figures target {summary['run_id']}"
    assert run.state.is_completed() and run.state.message.startswith("With the LoRA at weight 1.0, PickScore prefers")
    shown = {artifact.key: artifact for artifact in artifacts}
    assert not [key for key in shown if key.endswith("-progress")]  # of finished stages
    assert shown["result"].task_run_id is None and run.state.message in shown["result"].data
    assert "| dpo.max_steps | 2 | optimizer steps |" in shown["settings"].data
    assert shown["settings"].created == min(artifact.created for artifact in artifacts)  # a run that fails has them too
    rate = summary["win_rate"]["pickscore"]
    assert set(rate) == {"rate", "ci_low", "ci_high", "wins", "losses", "ties", "n"}
    assert rate["n"] == 8 == rate["wins"] + rate["losses"] + rate["ties"]
    assert summary["pool_images"] == 18 and summary["triplets"] + summary["rejected"] == 6
    assert summary["artifacts"].keys() >= {"report", "lora", "triplets"}
    assert summary["artifacts"]["lora"].endswith(f"/models/{summary['lora_id']}")
    card = Path(parameters["root"], key(summary, "triplets"), "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n") and "| winner - loser |" in card
    assert all(seconds >= 0 for seconds in summary["timings"].values())


def test_what_it_made_is_sent_as_assets_with_their_lineage(summary):
    sent = sent_events(MATERIALIZED, f"{summary['root']}/", at_least=10)
    sources = {event["resource"]["prefect.resource.id"].removeprefix(f"{summary['root']}/"): {
        one["prefect.resource.id"].removeprefix(f"{summary['root']}/") for one in event["related"]
        if one["prefect.resource.role"] == "asset"} for event in sent}
    kinds = Counter(key.partition("/")[0] for key in sources)
    assert kinds == {"models": 2, "pools": 3, "scores": 3, "triplets": 1, "evaluations": 1}

    def back(key):
        return {key}.union(*(back(source) for source in sources.get(key, ())))

    evaluation, = (key for key in sources if key.startswith("evaluations/"))
    assert f"models/{summary['lora_id']}" in back(evaluation)
    assert back(evaluation) | {key for key in sources if "sft" in key} == sources.keys()  # no source is unknown


def test_runs_without_a_pool_end_with_their_report_and_artifacts_too(server, parameters, tmp_path):
    parameters = {**parameters, "root": str(tmp_path / "root")}
    write_parquet(tmp_path / "their-pairs", [pair(i, i % 2 if i else None) for i in range(4)])
    overrides = {**parameters["overrides"], "alignprop.max_steps": 1, "alignprop.batch_size": 2,
                 "alignprop.global_batch_size": 2, "alignprop.least_live_steps": 1}
    foreign = hgdpo(**{**parameters, "overrides": {**overrides, "pairs": str(tmp_path / "their-pairs")}})
    assert foreign["foreign_pairs"]["used"] == 3 == foreign["triplets"] and foreign["pool_images"] == 0
    reward = hgdpo(**{**parameters, "overrides": {**overrides, "objective": "alignprop"}})
    assert reward["lora_id"].startswith("alignprop-") and "pool" not in reward["timings"]
    with get_client(sync_client=True) as client:
        runs = {run.name.split()[-1]: run for run in client.read_flow_runs()}
        for found, tables in ((foreign, {"foreign-pairs"}), (reward, set())):
            run = runs[found["run_id"]]
            shown = client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
            keys = {artifact.key for artifact in shown}
            assert run.state.is_completed() and keys >= {"result", "settings"} | tables
            assert "pool-ranking" not in keys


def test_an_evaluation_generates_one_image_per_prompt(summary, parameters):
    from hgdpo_core.storage import Store
    from hgdpo_core.storage.shards import ShardFolder

    store = Store(parameters["root"])
    rows = {}
    for name in store.list_folders("pools"):
        manifests = ShardFolder.open(store, f"pools/{name}").manifests()
        rows.setdefault(name.split("-")[0], []).append(sum(manifest.rows for manifest in manifests.values()))
    assert rows == {"n3": [18], "n1": [8, 8]}  # the pool; the held-out prompts by the target and by the tuned model


def test_the_report_stands_beside_the_summary(summary, parameters):
    folder = Path(parameters["root"]) / "runs" / summary["run_id"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    page = (folder / "report.html").read_text()
    assert "a man in a blue top, number" in page and "<script" not in page
    assert "--set sampler.steps=2" in page  # the command that repeats this run


def test_the_second_run_finds_everything(summary, parameters):
    def shards():
        files = Path(parameters["root"]).rglob("*")
        return {p: p.stat().st_mtime_ns for p in files if p.suffix in (".parquet", ".safetensors")}

    before = shards()
    again = hgdpo(**parameters)
    assert shards() == before
    assert again["win_rate"] == summary["win_rate"] and again["artifacts"] == summary["artifacts"]
    made = {stage: seconds for stage, seconds in summary["timings"].items() if stage != "prepare"}
    assert summary["found"] == [] and set(again["found"]) == set(made)
    assert {stage: again["timings"][stage] for stage in made} == made  # what making took, not what finding took


def test_a_study_of_both_models_is_made_at_the_end(summary, parameters, tmp_path):
    finished = hgdpo(**parameters, study=5)
    store = Store(parameters["root"])
    study = open_study(store)
    assert study.models == ["target", "tuned"] and len(study.pairs) == 5
    assert finished["people"] == [{"study_id": study.id, "win_rates": []}] and "study" in finished["timings"]
    page = (Path(parameters["root"]) / "runs" / finished["run_id"] / "report.html").read_text()
    assert study.serve_command in page
    shown = latest_artifact("study").data
    assert f"5 pairs of target and tuned for {study.people} people" in shown and study.serve_command in shown

    found = hgdpo_study(sources=[finished["run_id"]], root=parameters["root"], pairs=5)  # the same one, by its run
    assert found["study_id"] == study.id and found["pairs"] == 5 and found["refused"] == {}
    with pytest.raises(InputError, match="no run, evaluation or data set"):
        hgdpo_study(sources=["nothing"], root=parameters["root"])

    session = StudySession(study, tmp_path / "log")
    participant, _ = joined(session)
    answers(session, participant, len(participant.trials))
    session.close()
    assert main(["study", "results", "--root", parameters["root"], "--artifact"]) == 0
    row, = json.loads(latest_artifact(f"people-{study.id}").data)
    assert (row["model"], row["against"], row["people"]) == ("tuned", "target", 1)
    assert [len(one["win_rates"]) for one in hgdpo(**parameters)["people"]] == [2]  # from either model's side


def latest_artifact(key):
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    return max(found, key=lambda artifact: artifact.created)


def key(summary, artifact):
    """The store's key of one of the summary's artifacts."""
    return summary["artifacts"][artifact].removeprefix(summary["root"] + "/")


def test_plain_diffusers_opens_target_and_lora_and_reproduces_an_image_of_the_pool(summary, parameters):
    import torch

    from hgdpo_core.images import decode_image
    from hgdpo_core.storage import Store
    from hgdpo_core.storage.shards import ShardFolder

    store = Store(parameters["root"])
    sft = next(name for name in store.list_folders("models") if name.startswith("sft-"))
    pipeline = StableDiffusionPipeline.from_pretrained(store.local_path(f"models/{sft}"))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    row = ShardFolder.open(store, key(summary, "pool")).read(0).to_pylist()[4]

    def generate():
        return np.asarray(pipeline(row["prompt"], width=32, height=32, num_inference_steps=2, guidance_scale=1.5,
                                   generator=torch.Generator().manual_seed(row["seed"])).images[0]).astype(int)

    assert np.abs(generate() - np.asarray(decode_image(row["image"])).astype(int)).max() <= 1
    plain = generate()
    pipeline.load_lora_weights(store.local_path(key(summary, "lora")))
    assert np.abs(generate() - plain).max() > 1


def test_an_export_carries_the_run_out_of_the_store(summary, parameters, tmp_path):
    import torch

    assert main(["export", summary["run_id"], "--root", parameters["root"], "--to", str(tmp_path), "--fused"]) == 0
    kohya = Path(parameters["root"], key(summary, "lora")).name + "-kohya.safetensors"
    files = tmp_path / kohya, Path(parameters["root"], key(summary, "lora"), kohya)
    # Not byte by byte: safetensors writes a file's metadata in any order.
    exported, stored = ({name: value.tolist() for name, value in load_file(file).items()} for file in files)
    assert exported == stored
    sft = next(Path(parameters["root"], "models").glob("sft-*"))  # the LoRA was trained on the fine-tuned model
    with_lora = StableDiffusionPipeline.from_pretrained(sft)
    with_lora.load_lora_weights(tmp_path, weight_name=kohya, adapter_name="hgdpo")
    with_lora.set_adapters(["hgdpo"], [summary["lora_weight"]])
    images = []
    for pipeline in (with_lora, StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")):
        pipeline.set_progress_bar_config(disable=True)
        images.append(np.asarray(pipeline("a woman", width=32, height=32, num_inference_steps=2,
                                          generator=torch.Generator().manual_seed(1)).images[0]).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1
    assert "TO FILL IN" in (tmp_path / "README.md").read_text()


def test_a_plan_makes_nothing(server, parameters, tmp_path):
    changed = parameters | {"root": str(tmp_path / "root"), "images": None, "plan_only": True}
    plan = hgdpo(**changed)["plan"]
    assert plan["stages"][0]["missing"] == 18 and plan["stages"][0]["missing_shards"] == 2
    timed = hgdpo(**changed, probe=True)["plan"]
    assert "timed on" in timed["stages"][0]["basis"] and "timed on" not in plan["stages"][0]["basis"]
    assert not (tmp_path / "root").exists()


def test_evaluation_prompts_must_not_occur_in_training(server, parameters):
    overrides = parameters["overrides"] | {"evaluation.prompts": {"source": parameters["prompts"]}}
    with pytest.raises(InputError, match="6 of 6 evaluation prompts occur in training"):
        hgdpo(**(parameters | {"overrides": overrides}))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--preset", "flux"], "no preset 'flux'"),
    (["--prompts", "nowhere.txt"], "there is no prompt file"),
    (["--target", "/no/such/model"], "does not exist"),
    (["--root", "/proc/hgdpo"], "/proc/hgdpo"),
    (["--images", "/no/such/folder"], "is not a folder"),
    (["--set", "dpo.beta=-1"], "dpo.beta"),
])
def test_bad_input_is_one_line_and_no_traceback(arguments, message, capsys, tmp_path):
    root = [] if "--root" in arguments else ["--root", str(tmp_path)]
    assert main(["run", *root, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("hgdpo: error: ") and error.count("\n") == 1


def test_plan_and_gc_commands(parameters, tmp_path, capsys):
    settings = [f"--set={name}={json.dumps(value)}" for name, value in parameters["overrides"].items()]
    arguments = ["--root", str(tmp_path), "--target", parameters["target"], "--prompts", parameters["prompts"]]
    assert main(["plan", "--json", *arguments, *settings]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["missing"] == 18
    assert main(["plan", *arguments, *settings]) == 0
    assert "18 images" in capsys.readouterr().out
    assert main(["plan", "--probe", *arguments, *settings]) == 0
    captured = capsys.readouterr()
    assert "timed on" in captured.out and "this loads the models" in captured.err
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "pools" / "n3-left" / "shard-00000-000000000000.parquet"
    path.parent.mkdir(parents=True)
    (path.parent / "config.json").write_text("{}")  # by which the root is one of ours
    path.write_bytes(b"left by a killed writer")
    os.utime(path, (0, 0))
    assert main(["gc", "--root", str(tmp_path), "--dry-run"]) == 0
    assert "would remove 1 file of" in capsys.readouterr().out and path.exists()
    assert main(["gc", "--root", str(tmp_path)]) == 0
    assert not path.exists()


def test_the_same_road_on_s3(server, parameters, summary):
    """A bucket holds the same rows as a folder, and the second run finds the models through the local cache."""
    there = parameters | {"root": "s3://bucket/people"}
    with served_bucket():
        made, again = hgdpo(**there), hgdpo(**there)
    assert made["win_rate"] == again["win_rate"] == summary["win_rate"]
    assert made["artifacts"]["lora"].startswith("s3://bucket/people/models/dpo-")
    assert key(made, "pool") == key(summary, "pool") and key(made, "lora") == key(summary, "lora")
