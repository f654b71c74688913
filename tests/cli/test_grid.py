"""`quantline grid`: recipes and variants of a sweep, written as files of conf/."""

import pytest

from quantline.config.compose import compose
from tests.helpers.command_line import quantline


def test_grid_writes_files_that_compose(folder):
    options = ["--bits", "3,2", "--group-size=-1,64", "--suite", "mine"]
    done = quantline("grid", "rtn", *options)
    assert done.exit_code == 0, done.output
    names = ["rtn-w3grow", "rtn-w3g64", "rtn-w2grow", "rtn-w2g64"]
    assert done.output.splitlines() == [
        *(f"recipe {name}, variant {name}" for name in names),
        "conf/suite/mine.yaml has them: quantline repro suite=mine",
    ]
    composed = compose(["suite=mine"])
    assert list(composed["recipes"]) == ["none", *names]
    assert composed["recipes"]["rtn-w2grow"]["group_size"] == -1


def test_grid_takes_a_format_and_values_of_every_kind(folder):
    options = ["--format", "onnx", "--act-order", "true,false", "--damping", "0.05"]
    done = quantline("grid", "gptq", *options, "--budget", "{},{bits: [3, 4], size_mib: 9}")
    assert done.exit_code == 0, done.output
    recipes = compose(["suite=sweep"])["recipes"]
    assert set(recipes) - {"none"} == {
        "gptq-w4g128-damping0_05-budget",
        "gptq-w4g128-damping0_05-budget9mib",
        "gptq-w4g128-act_orderfalse-damping0_05-budget",
        "gptq-w4g128-act_orderfalse-damping0_05-budget9mib",
    }
    assert recipes["gptq-w4g128-damping0_05-budget9mib"]["budget"]["bits"] == [3, 4]
    assert "variant onnx-gptq-w4g128-damping0_05-budget" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gtpq"], "unknown method 'gtpq' (did you mean gptq?)"),
        (["gptq", "--bitts", "3"], "gptq has no option bitts"),
        (["gptq", "--bits", "3,5"], "gptq.bits: "),
        (["gptq", "--bits"], "found --bits without a value"),
        (["gptq", "bits", "3"], "expected --option value,value,…, found bits"),
        (["gptq", "--bits", "[3"], "expected values separated by commas for --bits"),
        (["gptq", "--format", "gguf"], "gguf carries the methods"),
    ],
)
def test_grid_refuses_what_is_unknown_and_writes_nothing(folder, arguments, words):
    before = sorted((folder / "conf").rglob("*"))
    done = quantline("grid", *arguments)
    assert done.exit_code == 1
    assert "config_invalid: " in done.output
    assert words in done.output
    assert sorted((folder / "conf").rglob("*")) == before
