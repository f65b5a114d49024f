"""The direction of imports: deployments -> flows -> tasks -> hgdpo_core, never backwards."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from prefect import Flow
from prefect.utilities.callables import get_call_parameters
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "hgdpo_core": {"hgdpo_core"},
    "tasks": {"hgdpo_core", "tasks", "prefect"},
    "flows": {"hgdpo_core", "tasks", "flows", "prefect"},
    "deployments": {"hgdpo_core", "tasks", "flows", "deployments", "prefect"},
}
GUARDED = set(MAY_IMPORT) | {"prefect", "tests"}
PURE = ["losses", "selection", "metrics", "schedule", "statistics/intervals", "statistics/colours",
        "statistics/diversity"]


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_no_layer_reaches_upward(layer):
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        reached = {name.split(".")[0] for name in imports(path)} & GUARDED
        assert reached <= MAY_IMPORT[layer], f"{path.relative_to(ROOT)} imports {reached - MAY_IMPORT[layer]}"


def test_pure_modules_touch_no_files_and_no_networks():
    for name in PURE:
        inner = {n for n in imports(ROOT / "hgdpo_core" / f"{name}.py") if n.startswith("hgdpo_core")}
        assert inner <= {f"hgdpo_core.{n.replace('/', '.')}" for n in [*PURE, "errors"]}, name


def test_a_parameter_left_out_reaches_its_flow_as_its_default():
    """Prefect 3.8 hands Field(default_factory=...) on as PydanticUndefined where the parameter is left out."""
    modules = [importlib.import_module(f"flows.{path.stem}") for path in sorted((ROOT / "flows").glob("*.py"))]
    found = {flow.name: flow for module in modules for flow in vars(module).values() if isinstance(flow, Flow)}
    assert "hgdpo" in found
    for name, flow in found.items():
        signature = inspect.signature(flow.fn).parameters
        required = {parameter: None for parameter, item in signature.items() if item.default is item.empty}
        for parameter, value in get_call_parameters(flow.fn, (), required).items():
            assert value is not PydanticUndefined, f"{name}: {parameter}"


def test_the_core_runs_without_prefect_installed():
    code = ("import sys; sys.modules['prefect'] = None\n"
            "import importlib, pkgutil, hgdpo_core\n"
            "for module in pkgutil.walk_packages(hgdpo_core.__path__, 'hgdpo_core.'):\n"
            "    if not module.name.endswith('__main__'):\n"
            "        importlib.import_module(module.name)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
