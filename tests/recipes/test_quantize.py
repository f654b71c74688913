"""The library call of the stage `quantize`: parts, resumption, the report and its summary."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from quantline.calibration.store import CalibrationStore
from quantline.config.recipes import parse_recipe
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.store import QuantizedModel
from quantline.recipes import quantize
from quantline.recipes.quantize import layer_gain, parts_of, quantize_model, summarize
from tests.helpers.calibrated import calibrate_into
from tests.helpers.quantized import tokens_of

GPTQ = parse_recipe({"method": "gptq", "bits": 3, "group_size": -1, "symmetric": False})
NONE = parse_recipe({"method": "none"})
KQUANT = parse_recipe({"method": "kquant", "mix": "Q8_0"})
CURVATURE = parse_recipe({"method": "kquant-curvature", "mix": "Q4_K_M"})


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_narrow):
    """(checkpoint, its calibration)."""
    checkpoint = Checkpoint(tiny_narrow)
    folder = tmp_path_factory.mktemp("quantize") / "calibration"
    return checkpoint, calibrate_into(folder, checkpoint, tokens_of(checkpoint))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parts_of_are_blocks_and_the_rest_if_something_is_rounded_there():
    assert parts_of(GPTQ, 2) == {"block-000": 0, "block-001": 1, "rest": None}
    in_floats = GPTQ.model_copy(update={"embedding_bits": None})
    assert parts_of(in_floats, 1) == {"block-000": 0}
    assert parts_of(KQUANT, 1) == {"block-000": 0, "rest": None}
    assert parts_of(NONE, 2) == {}


def test_quantize_model_goes_on_at_the_block_where_it_stopped(model, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    whole.mkdir()
    report = quantize_model("g", GPTQ, *model, whole)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    quantize_block = quantize.quantize_block
    blocks = []

    def stop_at_the_second(ctx, layer):
        if layer == 1:
            raise KeyboardInterrupt
        return quantize_block(ctx, layer)

    def note_blocks(ctx, layer):
        blocks.append(layer)
        return quantize_block(ctx, layer)

    monkeypatch.setattr(quantize, "quantize_block", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        quantize_model("g", GPTQ, *model, resumed)
    assert set(contents(resumed)) == {"block-000.json", "block-000.safetensors"}
    monkeypatch.setattr(quantize, "quantize_block", note_blocks)
    assert quantize_model("g", GPTQ, *model, resumed) == report
    assert blocks == [1, None] and contents(resumed) == contents(whole)


def test_quantize_model_reports_every_layer_and_every_step(model, tmp_path):
    checkpoint, calibration = model
    report = quantize_model("g", GPTQ, checkpoint, calibration, tmp_path)
    stored = QuantizedModel(tmp_path)
    assert stored.report == report | {"contents": stored.report["contents"]}
    assert report["recipe"] == {"name": "g", **GPTQ.model_dump(mode="json")}
    assert report["transforms"] == [{"step": "quantize", **GPTQ.model_dump(mode="json")}]
    assert report["calibration"] == calibration.provenance()
    assert sorted(report["layers"]) == stored.linears == sorted(checkpoint.arch.linears())
    keys = {"bits", "group_size", "symmetric", "shape", "tokens", "damping", "error", "rtn_error"}
    assert all(set(layer) == keys for layer in report["layers"].values())
    assert "activations" not in report and "importance" not in report


@pytest.mark.parametrize(
    ("method", "dynamic"), [("int8", False), ("fp8", True), ("smoothquant", True)]
)
def test_quantize_model_says_whether_activations_are_rounded(model, tmp_path, method, dynamic):
    report = quantize_model("x", parse_recipe({"method": method}), *model, tmp_path)
    assert report.get("activations") == ("dynamic" if dynamic else None)


def test_quantize_model_without_quantization_has_no_layers(model, tmp_path):
    report = quantize_model("none", NONE, *model, tmp_path)
    assert report["layers"] == {} and report["transforms"] == []
    assert set(contents(tmp_path)) == {"quantized.json"}


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq-gptq", "smoothquant", "curvature"])
def test_methods_leave_the_second_moments_as_they_are(model, tmp_path, method):
    """They are read once for all who ask for them."""
    grid = {"bits": 4, "group_size": -1, "symmetric": False}
    recipes = {
        "rtn": {"method": "rtn", "curvature": True, **grid},
        "gptq": {"method": "gptq", "curvature": True, **grid},
        "awq": {"method": "awq", **grid},
        "awq-gptq": {"method": "awq", "rounding": "gptq", **grid},
        "smoothquant": {"method": "smoothquant"},
        "curvature": {"method": "kquant-curvature", "mix": "Q4_K_M"},
    }
    checkpoint, calibration = model
    store = CalibrationStore(calibration.folder)
    quantize_model("t", parse_recipe(recipes[method]), checkpoint, store, tmp_path)
    (key, shrinkage), kept = store._last_read
    assert np.array_equal(kept, CalibrationStore(calibration.folder).hessian(key, shrinkage))


def test_layer_gain_is_the_mean_share_of_the_baseline():
    layers = {
        "a": {"error": 1.0, "rtn_error": 4.0},
        "b": {"error": 3.0, "rtn_error": 4.0},
        "c": {"error": 0.0, "rtn_error": 0.0},
    }
    assert layer_gain({"layers": layers}, GPTQ) == pytest.approx((0.25 + 0.75 + 1) / 3)
    assert layer_gain({"layers": {}}, NONE) is None
    curved = {"error": 9.0, "divergence": 1.0, "ggml_divergence": 2.0}
    tensors = {"a": curved, "norm": {"requested": "F32"}}
    assert layer_gain({"tensors": tensors}, CURVATURE) == 0.5
    assert layer_gain({"tensors": {"a": {"diagonal_error": 1.0}}}, KQUANT) is None


def test_summarize_gives_the_gain_in_words_and_figures():
    layers = {"a": {"error": 1.0, "rtn_error": 4.0}}
    summary = summarize({"layers": layers}, GPTQ)
    assert summary.text == "1 layers rounded, output error 0.25 of round-to-nearest's"
    assert summary.metrics == {"layers": 1, "error_over_rtn": 0.25, "fell_back": 0}
    tensors = {"a": {"error": 9.0, "divergence": 1.0, "ggml_divergence": 2.0}, "b": {}}
    summary = summarize({"tensors": tensors}, CURVATURE)
    assert summary.text == "2 tensors rounded, divergence 0.50 of ggml's own rounding's"
    assert summary.metrics == {"layers": 2, "divergence_over_ggml": 0.5, "fell_back": 0}
    assert summarize({"layers": {}}, NONE).text == "0 layers rounded"


def test_quantize_is_imported_without_torch_and_numba():
    code = (
        "import sys, quantline.recipes.quantize\n"
        "print([name for name in ('torch', 'numba', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "recipe",
    [
        GPTQ,
        parse_recipe({"method": "awq", "bits": 4, "group_size": -1, "symmetric": False}),
        CURVATURE,
    ],
    ids=lambda recipe: recipe.method,
)
def test_quantize_model_gives_the_same_bytes_for_any_number_of_threads(model, tmp_path, recipe):
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            folder = tmp_path / str(number)
            folder.mkdir()
            quantize_model("g", recipe, *model, folder)
            found.append(contents(folder))
    finally:
        torch.set_num_threads(threads)
    assert found[1] == found[0]
