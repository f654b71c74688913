"""The examples of CONTRIBUTING.md are complete modules in the house's form."""

import ast
import subprocess
import sys

import pytest

from tests.helpers.docs import blocks
from tests.helpers.project import ROOT

PREFIX = "plugin="
KINDS = ("method", "container", "runtime", "family", "metric")
EXAMPLES = {
    block.options.removeprefix(PREFIX): block.code
    for block in blocks(ROOT / "CONTRIBUTING.md")
    if block.options.startswith(PREFIX)
}


def test_contributing_has_one_example_of_each_kind():
    assert tuple(EXAMPLES) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_short_and_documented(kind):
    tree = ast.parse(EXAMPLES[kind])
    assert ast.get_docstring(tree)
    assert len(EXAMPLES[kind].splitlines()) <= 90


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_in_the_form_of_the_house(kind, tmp_path):
    path = tmp_path / f"{kind}.py"
    path.write_text(EXAMPLES[kind])
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", ROOT / "pyproject.toml", path],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_examples_import_nothing_heavy_at_the_top(kind):
    heavy = {"torch", "transformers", "numba", "onnx", "onnxruntime", "mlflow", "scipy", "gguf"}
    for node in ast.parse(EXAMPLES[kind]).body:
        names = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not heavy & {name.partition(".")[0] for name in names}
