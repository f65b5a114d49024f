"""The direction of imports: deployments -> flows -> tasks -> hgdpo_core, never backwards."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterable
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
CHECKED = set(MAY_IMPORT) | {"prefect", "tests"}
PURE = ["losses", "selection", "metrics", "schedule", "statistics/intervals", "statistics/colours",
        "statistics/diversity", "statistics/clusters"]


CORE = ROOT / "hgdpo_core"
SEAM = {"models", "figures"}                   # a family's networks are named here; figures makes one
SCHEDULE_CONTRACT = {"losses.py", "schedule.py"}  # public functions that take diffusers' DDPMScheduler
NETWORKS = {"StableDiffusionPipeline", "UNet2DConditionModel", "AutoencoderKL"}
CIRCLES_ALLOWED: dict[tuple[str, str], str] = {
    ("config", "scorers"): "a setting that names a scorer is checked against the one list of scorers, when it is given",
    ("config", "built_in"): "a source is checked to be built in; built_in uses the store only to write images",
}
"""An import that may close a circle, and why."""


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
        reached = {name.split(".")[0] for name in imports(path)} & CHECKED
        assert reached <= MAY_IMPORT[layer], f"{path.relative_to(ROOT)} imports {reached - MAY_IMPORT[layer]}"


def test_pure_modules_touch_no_files_and_no_networks():
    for name in PURE:
        inner = {n for n in imports(ROOT / "hgdpo_core" / f"{name}.py") if n.startswith("hgdpo_core")}
        assert inner <= {f"hgdpo_core.{n.replace('/', '.')}" for n in [*PURE, "errors"]}, name


def outside_the_seam() -> list[tuple[str, Path]]:
    """Files of the core that may not know a family of models, and of the layers above it."""
    files = [path for layer in MAY_IMPORT for path in sorted((ROOT / layer).rglob("*.py"))]
    named = [(path.relative_to(ROOT).as_posix().removeprefix("hgdpo_core/"), path) for path in files]
    return [(name, path) for name, path in named if name.split("/")[0] not in SEAM]


def network_attributes(tree: ast.AST) -> set[str]:
    """Where `.unet` or `.vae` of anything is read; the setting `target.vae` is a name that users write."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("unet", "vae"))
    return {name for name in map(ast.unparse, found) if not name.endswith("target.vae")}


def test_a_family_of_models_is_known_to_models_alone():
    """A new family is a file in models/: so nothing else touches its networks, nor the library that they come from."""
    files = outside_the_seam()
    assert len(files) > 100
    for name, path in files:
        tree = ast.parse(path.read_text())
        if name not in SCHEDULE_CONTRACT:
            assert not {module for module in imports(path) if module.split(".")[0] == "diffusers"}, name
        assert not network_attributes(tree), name
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert not names & NETWORKS, name


def test_network_attributes_are_found():
    assert network_attributes(ast.parse("pipeline.unet.to('cpu'); encode(self.pipeline.vae)")) == {
        "pipeline.unet", "self.pipeline.vae"}
    assert not network_attributes(ast.parse("config.target.vae"))


def core_imports() -> dict[tuple[str, str], set[str]]:
    """Which folder or top-level module of the core imports which, with the files where; imports in functions count."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in sorted(CORE.rglob("*.py")):
        relative = path.relative_to(CORE)
        own = folder_of(relative).removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            for name in imported_modules(node, relative) if own != "__init__" else ():
                other = folder_of(Path(*name.split(".")))
                if other != own and ((CORE / other).is_dir() or (CORE / f"{other}.py").exists()):
                    found.setdefault((own, other), set()).add(f"{relative}: {name}")
    return found


def folder_of(module: Path) -> str:
    """The folder of the core that counts as one; what makes the built-in weights is a program that uses the core."""
    makes = module.parts[:1] == ("figures",) and module.parts[1:2] in (("make",), ("__main__.py",))
    return "figures/make" if makes else module.parts[0]


def imported_modules(node: ast.AST, relative: Path) -> list[str]:
    """The modules of the core that a statement imports, without the leading `hgdpo_core.`."""
    if isinstance(node, ast.Import):
        return [a.name.removeprefix("hgdpo_core.") for a in node.names if a.name.startswith("hgdpo_core.")]
    if not isinstance(node, ast.ImportFrom):
        return []
    parents = relative.parts[:len(relative.parts) - node.level] if node.level else ()
    module = ".".join([*parents, *([node.module] if node.module else [])]) if node.level else node.module or ""
    if module in ("", "hgdpo_core"):
        return [alias.name for alias in node.names]
    return [module.removeprefix("hgdpo_core.")] if node.level or module.startswith("hgdpo_core.") else []


def find_circle(edges: Iterable[tuple[str, str]]) -> list[str]:
    """The names on a circle of these arrows, and those that lead to one; empty when there is none."""
    after: dict[str, set[str]] = {}
    for start, end in edges:
        after.setdefault(start, set()).add(end)
    while leaves := {end for ends in after.values() for end in ends if end not in after}:
        after = {start: ends - leaves for start, ends in after.items()}
        after = {start: ends for start, ends in after.items() if ends}
    return sorted(after)


def test_folders_of_the_core_import_each_other_in_no_circle():
    found = core_imports()
    assert ("training", "models") in found and ("config", "scorers") in found  # the latter in a function
    assert CIRCLES_ALLOWED.keys() <= found.keys(), "an exception that is no longer needed"
    left = {edge: where for edge, where in found.items() if edge not in CIRCLES_ALLOWED}
    circle = find_circle(left)
    assert not circle, {edge: where for edge, where in left.items() if set(edge) <= set(circle)}


def test_a_circle_is_found():
    assert find_circle([("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")]) == ["a", "b", "c"]
    assert find_circle([("a", "b"), ("a", "c"), ("b", "c")]) == []


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
