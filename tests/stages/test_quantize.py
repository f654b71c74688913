"""quantize: what each recipe writes, and that it repeats itself to the byte."""

import json

import numpy as np
import pytest
import torch

from quantline.calibration.store import CalibrationStore
from quantline.config.compose import load_params
from quantline.config.recipes import SHRINKAGE
from quantline.methods.integer.curvature import divergence
from quantline.methods.integer.grid import Grid
from quantline.methods.integer.rtn import round_to_nearest
from quantline.model.checkpoint import Checkpoint
from quantline.paths import CALIBRATION, MODEL, QUANTIZED
from quantline.quantized.store import QuantizedModel
from quantline.run.lineage import LINEAGE
from tests.helpers.quantized import tokens_of, torch_logprobs, torch_model
from tests.helpers.recipes import RECIPES

pytestmark = pytest.mark.xdist_group("quantize")  # each recipe's result once for all

K_QUANTS = ("q4_k_m", "q4_k_m-curvature")
SLOW = ("q4_k_m-curvature",)
# Recipe → what it minimizes; all others the error of the layer's outputs.
MEASURES = {
    "gptq-w4g128-curvature": "divergence",
    "awq-w4g128": "divergence",
    "smoothquant-w8a8": "output_change",
}


def files(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (QUANTIZED / name).iterdir()}


def quantized(name: str) -> QuantizedModel:
    return QuantizedModel(QUANTIZED / name)


def files_of(name: str) -> set[str]:
    """Return the files that a recipe has to make of a model of two blocks."""
    if name == "none":
        return {"quantized.json", LINEAGE}
    made = {"quantized.json", LINEAGE, "block-000.safetensors", "block-001.safetensors"}
    if name in K_QUANTS:
        made |= {"imatrix.gguf"}
    in_floats = ("int8", "smoothquant-w8a8", "fp8-w8a8")
    return made | ({"rest.safetensors"} if name not in in_floats else set())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RECIPES],
)
def test_quantize_twice_gives_the_same_bytes_and_a_report(
    calibrated_project, quantize_once, name, capsys
):
    quantize_once(name)
    first = files(name)
    calibrated_project.stage("quantize", name)
    assert files(name) == first
    assert set(first) == files_of(name)
    report = json.loads(first["quantized.json"])
    options = load_params().recipes[name].model_dump(mode="json")
    assert report["recipe"] == {"name": name, **options}
    assert set(report["calibration"]) == {"text_sha256", "tokens", "seed"}
    assert report["versions"]["torch"]
    layers = report.get("layers", {})
    assert len(layers) == (0 if name in ("none", *K_QUANTS) else 14)
    measure = MEASURES.get(name, "error")
    for entry in layers.values():
        assert entry["tokens"] == 512
        assert 0 < entry[measure] <= entry[f"rtn_{measure}"] * (1 + 1e-6)
        assert (entry["damping"] is not None) == name.startswith("gptq")
        assert ("divergence" in entry) == (measure == "divergence")
    assert f"quantize {name}: " in capsys.readouterr().out


def test_quantize_by_gptq_has_less_error_than_round_to_nearest(quantize_once):
    quantize_once("gptq-w4g128")
    layers = quantized("gptq-w4g128").report["layers"].values()
    assert np.mean([entry["error"] / entry["rtn_error"] for entry in layers]) < 0.9


def test_quantize_by_curvature_has_less_divergence_than_gptq(quantize_once):
    for name in ("gptq-w4g128", "gptq-w4g128-curvature"):
        quantize_once(name)
    with_curvature = quantized("gptq-w4g128-curvature").report["layers"]
    plain = divergences(quantized("gptq-w4g128"))
    assert mean_gain(with_curvature) < 0.95 * mean_gain(plain)


def mean_gain(layers: dict[str, dict[str, float]]) -> float:
    """Return the mean over the layers of the divergence over round-to-nearest's."""
    return float(
        np.mean([entry["divergence"] / entry["rtn_divergence"] for entry in layers.values()])
    )


def divergences(model: QuantizedModel) -> dict[str, dict[str, float]]:
    """Return the divergences of the layers, for a recipe whose report has none."""
    checkpoint = Checkpoint(MODEL)
    calibration = CalibrationStore(CALIBRATION)
    layers = {}
    for name in model.linears:
        weight = torch.from_numpy(checkpoint.tensor(f"{name}.weight"))
        hessian = torch.from_numpy(calibration.hessian(name, SHRINKAGE))
        fisher_out = torch.from_numpy(calibration.fisher_out(name))
        linear = model.linear(name)
        grid = Grid(linear.bits, linear.group_size, linear.symmetric)
        entry = {}
        for key, rounded in (
            ("divergence", linear),
            ("rtn_divergence", round_to_nearest(weight, grid)),
        ):
            difference = torch.from_numpy(rounded.dequantize()) - weight
            entry[key] = divergence(difference, hessian, fisher_out)
        layers[name] = entry
    return layers


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_quantize_by_awq_goes_with_every_rounding(calibrated_project, rounding):
    calibrated_project.compose(
        "recipe=[none,awq-w4g128]",
        "variant=[bf16]",
        f"recipes.awq-w4g128.rounding={rounding}",
        "recipes.awq-w4g128.bits=3",
        "recipes.awq-w4g128.curvature=true",
    )
    calibrated_project.stage("quantize", "awq-w4g128")
    layers = quantized("awq-w4g128").report["layers"]
    assert len(layers) == 14
    for entry in layers.values():
        assert entry["divergence"] < entry["rtn_divergence"]
        assert (entry["damping"] is not None) == (rounding == "gptq")


def test_quantize_by_awq_folds_its_scales_so_that_the_function_stays(
    calibrated_project, tiny_model
):
    """At 8 bits nothing but a wrong folding could move the logits."""
    calibrated_project.compose(
        "recipe=[none,awq-w4g128]",
        "variant=[bf16]",
        "recipes.awq-w4g128.bits=8",
        "recipes.awq-w4g128.group_size=32",
    )
    for name in ("none", "awq-w4g128"):
        calibrated_project.stage("quantize", name)
    checkpoint = Checkpoint(tiny_model)
    model = quantized("awq-w4g128")
    strengths = {}
    for step in model.report["transforms"]:
        if step["step"] == "fold_scales":
            strengths[step["into"].split(".", 3)[-1]] = step["reach"]
    assert set(strengths) == {"input_layernorm", "post_attention_layernorm", "mlp.up_proj"}
    assert any(strength > 0 for strength in strengths.values())
    assert len(model.overrides) == 4
    changes = [
        np.abs(model.override(name) / checkpoint.tensor(name) - 1).max() for name in model.overrides
    ]
    assert max(changes) > 0.05
    tokens = tokens_of(checkpoint)
    unquantized = torch_logprobs(torch_model(checkpoint, quantized("none")), tokens)
    logprobs = torch_logprobs(torch_model(checkpoint, model), tokens)
    assert np.abs(logprobs - unquantized).mean() < 0.02


def test_quantize_by_a_k_quant_names_the_requested_and_the_actual_type(quantize_once):
    quantize_once("q4_k_m")
    model = quantized("q4_k_m")
    tensors = model.report["tensors"]
    assert set(tensors) == set(model.ggml_names) == set(Checkpoint(MODEL).names)
    entry = dict(tensors["model.layers.0.mlp.gate_proj.weight"])
    assert 0 < entry.pop("diagonal_error") < entry.pop("rtn_diagonal_error")
    assert entry.pop("error_rows") == 512
    assert entry == {
        "requested": "Q4_K",
        "actual": "Q4_K",
        "shape": [512, 256],
        "tokens": 512,
        "importance": True,
    }
    assert tensors["model.embed_tokens.weight"]["actual"] == "Q6_K"
    assert tensors["model.norm.weight"]["actual"] == "F32"


def test_quantize_by_k_quant_curvature_compares_with_ggmls_own_rounding(
    calibrated_project, quantize_once, capsys
):
    calibrated_project.stage("quantize", "q4_k_m-curvature")
    assert "20 tensors rounded, divergence 0." in capsys.readouterr().out
    quantize_once("q4_k_m")
    plain = quantized("q4_k_m")
    model = quantized("q4_k_m-curvature")
    tensors = model.report["tensors"]
    curved = {name: entry for name, entry in tensors.items() if "divergence" in entry}
    assert len(curved) == 14
    for entry in curved.values():
        assert entry["tokens"] == 512
        assert entry["importance"]
        assert 0 < entry["divergence"] < 0.7 * entry["ggml_divergence"]
        assert entry["error"] > 0
        assert entry["ggml_error"] > 0
    scaled = set()
    for step in model.report["transforms"]:
        if step["step"] == "fold_scales" and step["reach"] > 0:
            scaled.add(f"{step['into']}.weight")
    assert any("norm" in name for name in scaled)
    for name, entry in tensors.items():
        blocks = model.ggml_blocks(name)
        assert blocks.type == entry["actual"]
        unchanged = np.array_equal(blocks.data, plain.ggml_blocks(name).data)
        assert unchanged == (name not in curved and name not in scaled), name
