"""The order of the method stands once: `pipeline.run_all`, and as calls of the same functions in `flows/full.py`."""

import ast
import inspect
from pathlib import Path

import pytest

import flows.full
from hgdpo_core import pipeline

ROOT = Path(__file__).parents[2]
STEPS = {name for name, value in vars(pipeline).items()
         if inspect.isfunction(value) and value.__module__ == pipeline.__name__ and not name.startswith("_")
         and name not in ("run_all", "make_all")}


def calls(function) -> list[str]:
    """Names of the functions that a function calls, in the order of the text, those of the pipeline followed."""
    names = []
    for node in ast.walk(ast.parse(inspect.getsource(function))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            names.append((node.lineno, node.col_offset, name))
    found = []
    for _, _, name in sorted(names, key=lambda call: call[:2]):
        found += calls(pipeline.make_all) if name == "make_all" else [name]
    return found


def test_the_flow_calls_the_steps_of_the_pipeline_in_its_order():
    steps = [name for name in calls(pipeline.run_all) if name in STEPS]
    assert len(steps) >= 11 and len(set(steps)) == len(steps)
    tasks = [name for name in calls(flows.full._run) if name is not None and name in vars(flows.full)]
    called = []
    for name in tasks:
        task = vars(flows.full)[name]
        of_pipeline = [step for step in calls(task.fn) if step in STEPS] if hasattr(task, "fn") else []
        assert len([step for step in of_pipeline if step in steps]) <= 1, f"task {name} makes more than one step"
        called += [step for step in of_pipeline if step in steps]
    assert called == steps


@pytest.mark.parametrize("folder", ["hgdpo_core", "tasks", "flows", "benchmarks", "tests"])
def test_no_other_file_lists_the_stages(folder):
    """Three steps of the method in one function are a list of stages: only the pipeline and its flow may hold one."""
    allowed = {"hgdpo_core/pipeline.py", "flows/full.py"}
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name in allowed or "/test_" in name:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                made = {ast.unparse(call.func).split(".")[0] for call in ast.walk(node) if isinstance(call, ast.Call)}
                chain = made & {"ScoreStage", "TripletStage", "LatentStage", "tune", "prepare_dpo", "generate_pool",
                                "score_pool", "build_triplets", "train_dpo"}
                assert len(chain) < 4, f"{name}:{node.lineno} {node.name} runs {sorted(chain)}"
