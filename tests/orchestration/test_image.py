"""Dockerfile, compose file and the template of Kubernetes jobs: linted, and the Dockerfile's steps run in a chroot."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from chroot import build, instructions, why_not
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prefect.utilities.templating import apply_values

ROOT = Path(__file__).parents[2]
TEMPLATE = json.loads((ROOT / "deployments" / "kubernetes.json").read_text())
DOCKERFILELINT = "dockerfilelint@1.8.0"


def test_the_compose_file_is_one():
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec",
               str(ROOT / "compose.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_services_use_one_image_and_their_settings_exist():
    from prefect.settings import get_current_settings

    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    ours = [service for service in services.values() if "build" in service]
    assert len(ours) == 7 and {service["image"] for service in ours} == {"hgdpo:latest"}
    for service in services.values():
        for name in service.get("depends_on", {}):
            assert name in services
    known = get_current_settings().to_environment_variables(exclude_unset=False)
    given = {name for service in ours for name in service["environment"] if name.startswith("PREFECT_")}
    assert given - known.keys() <= {"PREFECT_REDIS_MESSAGING_HOST"}  # of prefect-redis


def rendered(**values):
    """The Job that a worker would create, as Prefect fills its template."""
    defaults = {name: field["default"] for name, field in TEMPLATE["variables"]["properties"].items()
                if field.get("default") is not None}  # as Prefect: others are left out
    given = {"image": "hgdpo:1", "name": "run", "command": ["prefect", "flow-run", "execute"], "labels": {"a": "b"},
             "env": [{"name": "PREFECT_API_URL", "value": "http://server/api"}]}
    return apply_values(TEMPLATE["job_configuration"]["job_manifest"], defaults | given | values)


@pytest.mark.parametrize("values", [{}, {"gpus": 0}, {"gpus": 8, "memory_request": "64Gi", "cpu_limit": "16"}])
def test_kubernetes_takes_the_job_of_the_template(values):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(rendered(**values), "1.31", strict=True)


def test_a_job_has_its_gpus_shared_memory_secret_and_no_root():
    pod = rendered(gpus=2)["spec"]["template"]["spec"]
    container, = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert container["envFrom"] == [{"secretRef": {"name": "hgdpo", "optional": True}}]
    user = re.search(r"useradd .*--uid (\d+)", (ROOT / "Dockerfile").read_text())
    assert user and pod["securityContext"]["runAsUser"] == int(user[1])


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(shutil.which("npx") is None, reason="no npx here: dockerfilelint comes from npm")
def test_the_dockerfile_is_linted():
    done = subprocess.run(["npx", "--yes", DOCKERFILELINT, "--output", "json", "Dockerfile"], cwd=ROOT, text=True,
                          capture_output=True)
    report = json.loads(done.stdout)
    assert report["totalIssues"] == 0, done.stdout


def test_the_image_ends_as_another_user_than_root_and_has_what_the_build_needs():
    steps = instructions((ROOT / "Dockerfile").read_text())
    assert [rest for word, rest in steps if word == "USER"] == ["hgdpo"]
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    assert {"hgdpo_core", "tasks", "flows", "deployments", "pyproject.toml", "constraints.txt"} <= set(kept)


def test_every_requirement_of_the_image_and_of_make_has_a_tested_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    requirements = [Requirement(line) for lines in (project["dependencies"], *project["optional-dependencies"].values())
                    for line in lines]
    assert len(requirements) > 30
    for one in requirements:
        assert one.specifier.contains(pinned[canonicalize_name(one.name)]), one.name


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_the_dockerfiles_steps_install_from_nothing_and_run_the_demo_without_root(tmp_path):
    """HGDPO_TEST_DEMO: more arguments of the run, for a shorter one. Torch's wheel: PIP_FIND_LINKS, else from PyPI."""
    stage = build(tmp_path, {})
    assert stage.run("id -un").strip() == "hgdpo"
    assert stage.run("pip check").strip() == "No broken requirements found."
    assert {"prefect.yaml", "automations.yaml", "kubernetes.json"} <= set(stage.run("ls").split())
    assert not list((stage.root / "var/lib/apt/lists").iterdir()) and not (stage.root / "root/.cache/pip").exists()
    more = os.environ.get("HGDPO_TEST_DEMO", "")
    stage.run(f"hgdpo run --preset figures --root output/demo --publish output/demo {more}")
    summary = json.loads((stage.root / "home/hgdpo/output/demo/summary.json").read_text())
    assert summary["preset"] == "figures" and summary["win_rate"]
