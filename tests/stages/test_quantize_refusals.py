"""quantize: what it refuses, by name and without leaving anything."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantline.calibration.store import CalibrationStore
from quantline.errors import Failure, Reason
from quantline.methods.ggml.curvature import KQuantCurvature
from quantline.methods.ggml.quantize import quantize_blocks
from quantline.methods.integer.gptq import Gptq
from quantline.methods.integer.grid import Grid
from quantline.methods.integer.rtn import round_to_nearest
from quantline.paths import CALIBRATION, MODEL, QUANTIZED
from quantline.run.lineage import lineage_file
from tests.helpers.models import place_model
from tests.helpers.project import Project
from tests.helpers.recipes import CHOOSE_RECIPES
from tests.helpers.tensor_files import read_tensors, write_tensors


def assert_refused(project: Project, capsys, name: str, failure: Failure, words: str) -> None:
    """Run the stage, which has to fail by name and leave nothing."""
    with pytest.raises(SystemExit) as stopped:
        project.stage("quantize", name)
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert f"quantize {name}: export_quantization_failed ({failure}): " in message
    assert words in message
    event = project.events()[-1]
    assert event["severity"] == "error"
    assert event["reason_code"] == Reason.EXPORT_QUANTIZATION_FAILED
    assert event["payload"] == {"instance": name, "failure": failure}
    assert words in event["summary"]
    assert not QUANTIZED.exists() or not list(QUANTIZED.iterdir())


def test_quantize_by_curvature_needs_a_calibration_with_gradients(calibrated_project, capsys):
    names = ("gptq-w4g128-curvature", "q4_k_m-curvature")
    recipes = f"recipe=[none,{','.join(names)}]"
    calibrated_project.compose(recipes, "variant=[bf16]", "calibration.curvature=false")
    calibrated_project.stage("calibrate")
    assert {path.name for path in CALIBRATION.iterdir()} == {
        "calibration.json",
        "lineage.json",
        "tokens.safetensors",
        "final.safetensors",
        "inputs-000.safetensors",
        "inputs-001.safetensors",
    }
    for name in names:
        words = "set calibration.curvature=true"
        assert_refused(calibrated_project, capsys, name, Failure.CALIBRATION_EMPTY, words)


def test_quantize_refuses_a_k_quant_worse_than_ggmls(calibrated_project, capsys, monkeypatch):
    def round_badly(self, weight, ggml_type, *_, **__):
        return quantize_blocks(weight * 1.3, ggml_type), 0.01

    monkeypatch.setattr(KQuantCurvature, "_round", round_badly)
    failure = Failure.WORSE_THAN_ROUND_TO_NEAREST
    assert_refused(calibrated_project, capsys, "q4_k_m-curvature", failure, "ggml's own rounding's")


def test_quantize_refuses_a_layer_worse_than_round_to_nearest(
    calibrated_project, capsys, monkeypatch
):
    def improve_badly(self, linear, weight, *_):
        return round_to_nearest(weight * 1.3, Grid(4, 128, False))

    monkeypatch.setattr(Gptq, "improve", improve_badly)
    failure = Failure.WORSE_THAN_ROUND_TO_NEAREST
    words = "model.layers.0.mlp.down_proj has the error"
    assert_refused(calibrated_project, capsys, "gptq-w4g128", failure, words)


def test_quantize_refuses_a_mix_that_needs_an_importance_matrix(calibrated_project, capsys):
    calibrated_project.compose(
        CHOOSE_RECIPES,
        "recipes.q4_k_m.mix=IQ2_XS",
        "recipes.q4_k_m.importance=false",
    )
    words = "IQ2_XS is garbage without one"
    assert_refused(calibrated_project, capsys, "q4_k_m", Failure.IMPORTANCE_MISSING, words)


def test_quantize_refuses_rows_that_the_groups_do_not_divide(
    calibrated_project, capsys, make_model, tmp_path
):
    odd = make_model(tmp_path / "odd", intermediate_size=320, num_hidden_layers=1)
    shutil.rmtree(MODEL)
    place_model(odd, MODEL)
    calibrated_project.compose("recipes.gptq-w4g128.group_size=128")
    calibrated_project.stage("calibrate")
    capsys.readouterr()
    words = "group_size can be 64, 32 here"
    assert_refused(calibrated_project, capsys, "gptq-w4g128", Failure.UNSUPPORTED_WIDTH, words)


def test_quantize_refuses_weights_that_are_not_finite(calibrated_project, capsys):
    tensors = read_tensors(MODEL)
    tensors["model.layers.1.self_attn.v_proj.weight"].reshape(-1)[5] = np.nan
    write_tensors(MODEL / "model.safetensors", tensors)
    for name in ("rtn-w4g128", "awq-w4g128", "q4_k_m"):
        assert_refused(calibrated_project, capsys, name, Failure.NON_FINITE, "not finite")


def change_diagonal(layer: str, change) -> None:
    """Change the diagonal of one H of the stored calibration."""
    entry = CalibrationStore(CALIBRATION).info["layers"][layer]
    path = CALIBRATION / f"weighted-{entry['block']:03d}.safetensors"
    key = f"{entry['moments']}.diagonal"
    tensors = load_file(path)
    tensors[key] = change(tensors[key])
    write_tensors(path, tensors)
    lineage_file("calibration").unlink()  # which knows the file as it was


def check_that_one_layer_fell_back(project, recipe: str, layers: set[str], words: str) -> None:
    project.stage("quantize", recipe)
    report = json.loads((QUANTIZED / recipe / "quantized.json").read_text())
    said = {
        name: layer["fallback"] for name, layer in report["layers"].items() if "fallback" in layer
    }
    assert said.keys() == layers
    assert all(words in how for how in said.values())


def test_quantize_contains_a_hessian_that_cannot_be_inverted(calibrated_project):
    def spoil(values):
        return np.where(values == values.max(), -2 * values, 2 * values)

    change_diagonal("model.layers.1.mlp.down_proj", spoil)
    for recipe in ("gptq-w4g128", "gptq-w4g128-curvature"):
        words = "rounded to nearest: hessian_not_positive_definite: expected second moments"
        layers = {"model.layers.1.mlp.down_proj"}
        check_that_one_layer_fell_back(calibrated_project, recipe, layers, words)


def test_quantize_contains_a_hessian_that_is_not_finite(calibrated_project):
    layer = "model.layers.0.mlp.down_proj"
    change_diagonal(layer, lambda values: values * np.float32("nan"))
    words = "rounded as if all mattered alike: its inputs are not finite"
    check_that_one_layer_fell_back(calibrated_project, "gptq-w4g128", {layer}, words)


def test_quantize_contains_one_layer_that_is_worse_than_rounded_to_nearest(
    calibrated_project, monkeypatch
):
    improve = Gptq.improve
    calls = []

    def improve_badly(self, linear, weight, *more):
        calls.append(weight)
        if len(calls) == 3:
            return round_to_nearest(weight * 1.3, Grid(4, 128, False))
        return improve(self, linear, weight, *more)

    monkeypatch.setattr(Gptq, "improve", improve_badly)
    words = "rounded to nearest: worse_than_round_to_nearest"
    layers = {"model.layers.0.self_attn.v_proj"}
    check_that_one_layer_fell_back(calibrated_project, "gptq-w4g128", layers, words)


def test_quantize_refuses_a_recipe_that_there_is_not(calibrated_project, capsys):
    with pytest.raises(SystemExit):
        calibrated_project.stage("quantize", "gptq-w4g12")
    assert "did you mean gptq-w4g128?" in capsys.readouterr().err
    assert calibrated_project.events()[-1]["reason_code"] == Reason.CONFIG_INVALID
