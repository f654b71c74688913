"""Fitting to a budget in the stage: the same bytes each time, also after a kill; failures."""

import json
import re
import shutil

import pytest

from quantline.calibration.store import INFO
from quantline.config.compose import load_params
from quantline.errors import Failure
from quantline.recipes.budget import fit
from quantline.recipes.budget.costs import Costs
from quantline.run.lineage import lineage_file
from tests.helpers.budget import (
    assert_refused,
    bits_per_weight,
    budget_of,
    compose,
    export,
    options_of,
    quantize,
)
from tests.helpers.injection import kill_after_calls
from tests.helpers.project import Project


def files_of(project: Project, name: str) -> dict[str, bytes]:
    folder = project.root / "artifacts/quantized" / name
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name", ["q4_k_m-budget", pytest.param("gptq-w4g128-budget", marks=pytest.mark.slow)]
)
def test_fit_twice_gives_the_same_bytes(ready, name):
    quantize(ready, name)
    first = files_of(ready, name)
    quantize(ready, name)
    assert files_of(ready, name) == first
    assert "quantized.json" in first
    assert not any(file.startswith("costs") for file in first)


@pytest.mark.parametrize(
    ("name", "limit", "format"),
    [
        ("q4_k_m-budget", 4.0, "gguf"),
        pytest.param("gptq-w4g128-budget", 5.0, "safetensors", marks=pytest.mark.slow),
    ],
)
def test_fit_to_bits_per_weight_gives_those_of_the_manifest(ready, tmp_path, name, limit, format):
    compose(ready, f"+recipes.{name}.budget.bits_per_weight={limit}")
    bundle = export(quantize(ready, name), tmp_path / "out", format)
    assert limit * 0.96 < bits_per_weight(bundle, format) <= limit


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("q4_k_m-budget", "size_mib"),
        ("q4_k_m-budget", "bits_per_weight"),
        pytest.param("gptq-w4g128-budget", "size_mib", marks=pytest.mark.slow),
    ],
)
def test_fit_to_what_nothing_fits_in_says_the_least(ready, capsys, name, limit):
    compose(ready, f"+recipes.{name}.budget.{limit}=0.2")
    words = f"expected a budget of at least {limit}: "
    summary = assert_refused(ready, capsys, name, Failure.CONFIG_INVALID, words)
    assert "found 0.200; raise it" in summary
    least = re.search(r"at least \w+: ([\d.]+)", summary)[1]
    compose(ready, f"+recipes.{name}.budget.{limit}={least}")
    smallest = "Q2_K" if name == "q4_k_m-budget" else "w2g128"
    assert set(options_of(quantize(ready, name)).values()) == {smallest}
    compose(ready, f"+recipes.{name}.budget.{limit}={float(least) - 0.002}")
    assert_refused(ready, capsys, name, Failure.CONFIG_INVALID, least)


def test_fit_with_types_that_are_all_larger_than_the_mix_is_refused(ready, capsys):
    compose(ready, "recipes.q4_k_m-budget.budget.types=[Q6_K,Q8_0]")
    words = "expected a budget of at least size_mib: "
    assert_refused(ready, capsys, "q4_k_m-budget", Failure.CONFIG_INVALID, words)


def test_fit_without_gradients_weighs_shares_of_the_output(ready):
    path = ready.root / "artifacts/calibration" / INFO
    info = json.loads(path.read_text()) | {"curvature": False}
    path.write_text(json.dumps(info))
    lineage_file("calibration").unlink()  # which knows the file as it was
    step = budget_of(quantize(ready, "q4_k_m-budget"))
    assert step["unit"] == "share of the squared output"
    assert 0 < step["predicted"] < step["predicted_without"]


def kill_after(project: Project, name: str, parts: int) -> None:
    """Run the stage in a process that is killed when it has the costs of so many parts."""
    kill_after_calls(project.root, "quantize", name, fit, "write_json", parts)


def test_fit_after_a_kill_goes_on_with_the_costs_that_it_has(ready, capsys, monkeypatch):
    name = "q4_k_m-budget"
    quantize(ready, name)
    expected = files_of(ready, name)
    shutil.rmtree(ready.root / "artifacts/quantized")
    kill_after(ready, name, 2)
    computed = []
    original = Costs.of

    def listen(costs, tensor, weight):
        computed.append(tensor)
        return original(costs, tensor, weight)

    monkeypatch.setattr(Costs, "of", listen)
    quantize(ready, name)
    assert "resumes where a killed run stopped" in capsys.readouterr().out
    assert set(computed) == {"model.embed_tokens.weight"}
    assert files_of(ready, name) == expected


@pytest.mark.slow
def test_fit_after_a_kill_starts_over_with_another_budget(ready, capsys):
    kill_after(ready, "q4_k_m-budget", 2)
    compose(ready, "+recipes.q4_k_m-budget.budget.bits_per_weight=4.5")
    quantize(ready, "q4_k_m-budget")
    assert "starts over, because recipe changed since" in capsys.readouterr().out


def test_fit_leaves_the_choice_out_of_the_recipe_that_is_reported(ready):
    quantized = quantize(ready, "q4_k_m-budget")
    requested = load_params().recipes["q4_k_m-budget"].model_dump(mode="json")
    assert quantized.report["recipe"] == {"name": "q4_k_m-budget", **requested}
    assert not requested["overrides"]
