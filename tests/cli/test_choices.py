"""`quantline list` and `quantline show`, `--version`, and help with examples."""

from importlib.metadata import version

import pytest

from quantline.cli.choices import KINDS
from quantline.config.catalogue import GROUPS, names_of
from quantline.config.runtimes import RUNTIMES
from tests.helpers.command_line import quantline


@pytest.mark.parametrize("kind", KINDS)
def test_list_has_every_name(folder, kind):
    done = quantline("list", kind, "--names")
    assert done.exit_code == 0, done.output
    names = done.output.split()
    if kind in GROUPS:
        assert names == names_of(folder, GROUPS[kind])
    assert quantline("list", kind).exit_code == 0


def test_list_marks_what_params_has_and_says_what_each_is(folder):
    assert quantline("compose", "suite=quick").exit_code == 0
    lines = quantline("list", "recipes").output.splitlines()
    marked = {line.split()[1] for line in lines if line.startswith("*")}
    assert marked == {"none", "q4_k_m", "rtn-w4g128", "gptq-w4g128"}
    row = next(line.split() for line in lines if "gptq-w3g32 " in line)
    assert row == ["gptq-w3g32", "gptq", "3", "32", "-"]
    rows = quantline("list", "variants").output.splitlines()
    assert any(line.split() == ["onnx-int8", "rtn-w8", "onnx", "onnxruntime"] for line in rows)


def test_list_says_which_runtimes_are_not_installed_and_how_to_get_them(folder, monkeypatch):
    from quantline.doctor import packages

    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "vllm" else object())
    text = " ".join(quantline("list", "runtimes").output.split())
    assert "not installed" in text
    assert text.count("not installed") == 1
    assert RUNTIMES["vllm"].install.split()[0] in text


def test_show_has_all_options_with_their_meaning(folder):
    done = quantline("show", "recipe", "gptq-w3g32")
    assert done.exit_code == 0
    assert "bits: 3  # Bits per weight." in done.output
    assert "act_order: true" in done.output  # of the base file
    assert "# deployed by the variants gptq-w3g32" in done.output
    assert "name: edge" in quantline("show", "target", "edge").output
    assert "take it: model=hub model.id=..." in quantline("show", "model", "hub").output
    assert "gptq-w4g128" in quantline("show", "suite", "quick").output
    assert "goes into" in quantline("show", "method", "awq").output
    assert "formats: gguf" in quantline("show", "runtime", "llama.cpp").output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "recipies"], "expected one of models"),
        (["show", "recipe", "gtpq-w4g128"], "did you mean gptq-w4g128"),
        (["show", "colour", "red"], "expected one of model"),
        (["show", "method", "gtpq"], "did you mean gptq?"),
    ],
)
def test_what_there_is_not_is_told_with_what_there_is(folder, arguments, words):
    done = quantline(*arguments)
    assert done.exit_code == 1
    assert words in done.output


def test_the_program_has_a_version_examples_and_completion():
    assert quantline("--version").output.strip() == f"quantline {version('quantline')}"
    assert "quantline list models" in quantline("list", "--help").output
    assert "--install-completion" in quantline("--help").output
