"""The example workflow: well-formed, its shell too, and nothing but dvc, gh and quantline."""

import re
import subprocess

import pytest
import yaml

from tests.helpers.project import ROOT

PATH = ROOT / ".github/examples/quantline-gate.yml"
WORKFLOW = yaml.safe_load(PATH.read_text())
STEPS = WORKFLOW["jobs"]["gate"]["steps"]
SCRIPTS = [step["run"] for step in STEPS if "run" in step]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_shell(script):
    without_expressions = re.sub(r"\$\{\{.*?\}\}", "x", script)
    subprocess.run(["bash", "-n"], input=without_expressions, text=True, check=True)
    # What a pull request may choose is given by variables, never pasted into the shell.
    assert "${{" not in script


def test_the_workflow_comments_and_gates_in_that_order():
    names = [step.get("name") for step in STEPS]
    comment, gate = (
        names.index("Comment the table"),
        names.index("Fail unless the pick meets its target"),
    )
    assert comment < gate
    assert STEPS[gate]["run"] == "quantline gate --cannot-tell fails"
    assert WORKFLOW["permissions"] == {"contents": "read", "pull-requests": "write"}
    assert {step["uses"].split("/")[0] for step in STEPS if "uses" in step} == {"actions"}
