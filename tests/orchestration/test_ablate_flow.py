"""The ablation flow and its command on tiny models: the same numbers as the core's, one line for a mistake."""

import json
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from flows.ablate import hgdpo_ablate
from flows.cli import main
from hgdpo_core.ablate.conclude import run_ablation
from hgdpo_core.ablate.program import open_ablation

ASKED = {"seeds": 1, "worlds": ["tinted"], "comparisons": ["statistics"]}


@pytest.fixture(scope="module")
def parameters(tmp_path_factory, target_folder, judge_folder):
    folder = tmp_path_factory.mktemp("user")
    (folder / "prompts.txt").write_text("".join(f"a woman in a red top, number {i}\n" for i in range(3)))
    (folder / "held-out.txt").write_text("".join(f"a man in a blue top, number {i}\n" for i in range(4)))
    scorer = {"name": "pickscore", "source": str(judge_folder)}
    return {
        "root": str(folder / "root"), "target": str(target_folder), "prompts": str(folder / "prompts.txt"),
        "overrides": {
            "ablation.pool_sizes": [2, 3], "ablation.loser_ranks": [2, 3],
            "ablation.lambdas": [1e4], "target.dtype": "float32",
            "scorer.source": str(judge_folder), "evaluation.scorers": [scorer],
            "evaluation.prompts": {"source": str(folder / "held-out.txt")}, "sampler.width": 32, "sampler.height": 32,
            "sampler.steps": 1, "pool.images_per_prompt": 3, "pool.prompts_per_shard": 4, "dpo.max_steps": 2,
            "dpo.batch_size": 2, "dpo.learning_rate": 5e-2}}


@pytest.fixture(scope="module")
def result(server, parameters):
    return hgdpo_ablate(**parameters, **ASKED)


def test_the_flow_finds_what_the_core_would(result, parameters):
    labels = [(arm["world"], arm["label"]) for arm in result["arms"]]
    assert labels == [("tinted", name) for name in ("N-3", "N-3-LAN", "N-3-SML (lambda 1e6)",
                                                   "N-3-SML (lambda 10000)")]
    rest = {name: value for name, value in parameters.items() if name != "root"}
    ablation = open_ablation(root=parameters["root"], settings=ASKED, **rest)
    assert run_ablation(ablation) == result
    assert json.loads(Path(parameters["root"], ablation.key("result.json")).read_text()) == result


def test_every_arm_and_seed_is_a_task_of_its_own_name(result, server):
    with get_client(sync_client=True) as client:
        own = [run.id for run in client.read_flow_runs() if run.name.startswith("ablations figures target ")]
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=own)))
    assert {"N-3, tinted world, seed 0", "N-3-LAN, tinted world, seed 0"} <= {task.name for task in tasks}


def test_a_plan_makes_nothing(server, parameters, tmp_path):
    plan = hgdpo_ablate(**{**parameters, "root": str(tmp_path / "root")}, **ASKED, plan_only=True)["plan"]
    assert (plan["arms"], plan["trainings"], plan["pool_images"], plan["minutes"]) == (4, 3, 9, None)
    assert not (tmp_path / "root" / "pools").exists() and not (tmp_path / "root" / "models").exists()


def arguments(parameters, root):
    settings = [f"--set={name}={json.dumps(value)}" for name, value in parameters["overrides"].items()]
    return ["ablate", "--root", str(root), "--target", parameters["target"], "--prompts", parameters["prompts"],
            "--seeds", "1", "--worlds", "tinted", "--comparisons", "statistics", *settings]


def test_the_command_plans_and_finishes(result, parameters, tmp_path, capsys):
    assert main([*arguments(parameters, tmp_path), "--plan"]) == 0
    assert ["trainings", "3"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert main([*arguments(parameters, tmp_path), "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainings"] == 3
    assert main(arguments(parameters, parameters["root"])) == 0  # found, not made again
    out = capsys.readouterr().out
    assert "tinted world, LAN removes colour shift: " in out and result["artifacts"]["page"] in out


@pytest.mark.parametrize(("more", "message"), [
    (["--worlds", "pink"], "worlds.0"),
    (["--set", "ablation.pool_sizes=[7]"], "ablation.pool_sizes holds 7"),
    (["--split", "validation"], "only the figures setting's prompts"),
])
def test_a_mistake_is_one_line(parameters, tmp_path, capsys, more, message):
    assert main([*arguments(parameters, tmp_path), *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("hgdpo: error: ") and error.count("\n") == 1
