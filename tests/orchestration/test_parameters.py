"""Commands and flows have the same parameters, and a flow does not open again what its command opened."""

import argparse
import json
import subprocess
import sys

import pytest
from prefect.logging import disable_run_logger
from prefect.utilities.callables import get_call_parameters, parameter_schema

import tasks.prepare
from flows import parameters as p
from flows.ablate import hgdpo_ablate
from flows.cli import COMMANDS, main
from flows.evaluate import hgdpo_evaluate
from flows.full import hgdpo
from flows.personalise import hgdpo_personalise
from flows.rescore import hgdpo_rescore
from flows.study import hgdpo_study
from flows.study_command import STUDY_COMMANDS
from hgdpo_core.ablate.settings import AblationConfig, Comparison
from hgdpo_core.config.presets import INSTANTBOOTH, PRESETS
from hgdpo_core.errors import StoppedError
from tasks.handover import handed_over, take_opened

FLOWS = {"run": (hgdpo, p.RUN), "evaluate": (hgdpo_evaluate, p.EVALUATE), "ablate": (hgdpo_ablate, p.ABLATE),
         "personalise": (hgdpo_personalise, p.PERSONALISE),
         "rescore": (hgdpo_rescore, p.RESCORE), "study create": (hgdpo_study, p.STUDY_CREATE)}


@pytest.mark.parametrize("command", FLOWS)
def test_a_command_has_the_parameters_of_its_flow(command):
    flow, parameters = FLOWS[command]
    form = parameter_schema(flow).properties
    parser = argparse.ArgumentParser()
    for parameter in p.COMMAND_LINES[command]:
        parameter.changed(required=False).add_to(parser)
    typed = vars(parser.parse_args([]))
    assert form.keys() == {parameter.name for parameter in parameters}
    assert {name: typed[name] for name in form} == get_call_parameters(flow.fn, (), {})
    described = {item.name: item.form_help or item.help for item in parameters}
    assert {name: field["description"] for name, field in form.items()} == described
    shown = "".join(parser.format_help().split())  # argparse breaks lines inside words too
    assert all("".join(parameter.help.split()) in shown for parameter in parameters)


def test_options_of_the_command_line_alone():
    extra = {name: {item.name for item in p.COMMAND_LINES[name]} - {item.name for item in parameters}
             for name, (_, parameters) in FLOWS.items()}
    assert extra == {"run": {"publish", "json"}, "evaluate": {"publish", "json"}, "ablate": {"json"},
                     "personalise": {"json"},
                     "rescore": {"json"}, "study create": set()}
    assert p.COMMAND_LINES.keys() == COMMANDS.keys() | {f"study {name}" for name in STUDY_COMMANDS}


def test_choices_and_defaults_are_the_cores_own():
    assert parameter_schema(hgdpo).properties["preset"]["enum"] == list(PRESETS)
    assert p.ADAPTER_PRESET.suggested == tuple(INSTANTBOOTH)
    assert (p.SEEDS.default, p.SPLIT.default) == (AblationConfig().seeds, AblationConfig().split)
    assert all(name in p.COMPARISONS.help for name in Comparison.__args__)


def test_help_is_quick_for_it_imports_nothing_heavy():
    code = ("import json, sys\n"
            "from flows.cli import main\n"
            "try:\n    main(['--help'])\n"
            "except SystemExit:\n"
            "    print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(json.loads(output.splitlines()[-1]))
    assert "usage: hgdpo" in output and "flows" in loaded
    assert not loaded & {"torch", "prefect", "pydantic", "numpy", "pyarrow", "fsspec", "huggingface_hub"}


@pytest.mark.parametrize(("typed", "message"), [
    (["run", "--set", "dpo.beta"], "expected name=value, as dpo.beta=1000"),
    (["evaluate"], "--tuned"),
    (["run", "--shard-runner", "elsewhere"], "invalid choice"),
    (["evaluate", "--tuned", "x", "--lora-weights", "a"], "is not a list of numbers"),
])
def test_the_message_for_a_mistyped_option_names_what_was_expected(typed, message, capsys):
    with pytest.raises(SystemExit):
        main(typed)
    assert message in capsys.readouterr().err


def test_opened_inputs_are_taken_once_and_only_for_the_same_parameters():
    opened = []

    def open_it(**parameters):
        opened.append(parameters)
        return object()

    inputs, waiting = {"root": "a", "overrides": {"dpo.beta": 1}}, object()
    with handed_over(open_it, inputs, waiting):
        assert take_opened(open_it, **{**inputs, "root": "b"}) is not waiting
        assert take_opened(open_it, **inputs) is waiting
        assert take_opened(open_it, **inputs) is not waiting
    with handed_over(open_it, inputs, waiting):
        pass
    assert take_opened(open_it, **inputs) is not waiting
    assert len(opened) == 3


def test_a_command_opens_each_input_once(tmp_path, monkeypatch):
    """The flow's first task runs in the command's process with the parameters that the command handed to the flow."""
    read = []
    real = tasks.prepare.open_run.__globals__["read_prompts"]
    monkeypatch.setattr("hgdpo_core.run.read_prompts", lambda *given: read.append(given[0].source) or real(*given))

    def first_task(flow, **parameters):
        given = {name: parameters[name] for name in ("preset", "root", "prompts", "target", "images", "overrides")}
        with disable_run_logger():
            run = tasks.prepare.prepare.fn(**given, dry=False)
        assert len(read) == 2, "the training and the evaluation prompts, once each"
        assert run.config.dpo.beta == 7 and flow is hgdpo
        raise StoppedError("far enough")

    monkeypatch.setattr("flows.server.call_flow", first_task)
    (tmp_path / "prompts.txt").write_text("a woman in a red top\n")
    arguments = ["--root", str(tmp_path / "root"), "--prompts", str(tmp_path / "prompts.txt"), "--set", "dpo.beta=7"]
    assert main(["run", *arguments]) == 130
    assert read == [str(tmp_path / "prompts.txt"), "figures"]


def test_run_plan_and_plan_give_one_answer(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a woman in a red top\n")
    arguments = ["--root", str(tmp_path / "root"), "--prompts", str(tmp_path / "prompts.txt"), "--json"]
    answers = []
    for command in (["run", "--plan"], ["plan"]):
        assert main([*command, *arguments]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and json.loads(answers[0])["stages"]
    assert not (tmp_path / "root").exists()
