"""A degenerate layer stops no other: it is rounded, finite, and its report says how."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantline.config.recipes import parse_recipe
from quantline.methods.ggml.block_types import dequantize_blocks
from quantline.quantized.store import QuantizedModel
from quantline.recipes.fallback import KEY
from quantline.recipes.layer_report import MEASURES, TOLERANCE
from quantline.recipes.quantize import quantize_model
from tests.helpers.degenerate import USELESS, degenerate_model

pytestmark = pytest.mark.xdist_group("containment")  # one model for all

FOUR_BITS = {"bits": 4, "group_size": 32, "symmetric": False}
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", **FOUR_BITS, "scales": "minmax"},
    "rtn-weighted": {"method": "rtn", **FOUR_BITS},
    "gptq": {"method": "gptq", **FOUR_BITS},
    "gptq-rows": {"method": "gptq", "bits": 3, "group_size": -1, "symmetric": True},
    "gptq-curvature": {"method": "gptq", **FOUR_BITS, "curvature": True},
    "awq": {"method": "awq", **FOUR_BITS, "grid": 4},
    "awq-gptq": {"method": "awq", **FOUR_BITS, "grid": 4, "rounding": "gptq"},
    "smoothquant": {"method": "smoothquant"},
    "int8": {"method": "int8"},
    "fp8": {"method": "fp8"},
    "kquant": {"method": "kquant", "mix": "Q4_K_M"},
    "kquant-2": {"method": "kquant", "mix": "Q2_K"},
    "kquant-codebook": {"method": "kquant", "mix": "IQ3_M"},
    "kquant-curvature": {"method": "kquant-curvature", "mix": "Q4_K_M", "rounds": 1},
    "gptq-budget": {
        "method": "gptq",
        **FOUR_BITS,
        "budget": {"bits_per_weight": 9.0, "bits": [3, 4], "group_sizes": [32]},
    },
    "kquant-budget": {
        "method": "kquant",
        "mix": "Q4_K_M",
        "budget": {"bits_per_weight": 6.0, "types": ["Q4_K", "Q6_K", "Q8_0"]},
    },
}
SLOW = ("gptq-curvature", "gptq-rows", "gptq-budget", "awq-gptq", "kquant-codebook", "rtn-weighted")
SEEDS = range(8)


@pytest.fixture(scope="module")
def source(make_model, tmp_path_factory) -> Path:
    """A model of four blocks, some of whose layers are narrower than a k-quant's block."""
    return make_model(
        tmp_path_factory.mktemp("degenerate") / "source",
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
    )


@pytest.fixture(scope="module")
def degenerate(source, tmp_path_factory):
    """The model with every case in some layer: tables of unlike length go round."""
    folder = tmp_path_factory.mktemp("degenerate") / "in-turn"
    return degenerate_model(source, folder, lambda number, table: list(table)[number % len(table)])


def stored_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Return what the store holds, dequantized."""
    model = QuantizedModel(folder)
    stored = {name: model.linear(name).dequantize() for name in model.linears}
    for name in model.ggml_names:
        blocks = model.ggml_blocks(name)
        if blocks.type not in ("F32", "F16", "BF16"):
            stored[name] = dequantize_blocks(blocks.data, blocks.type)
    return stored


def check_recipe(name: str, degenerate, folder: Path) -> dict[str, Any]:
    """Quantize, check every layer, and return the reports."""
    checkpoint, calibration, cases = degenerate
    recipe = parse_recipe(RECIPES[name])
    report = quantize_model(name, recipe, checkpoint, calibration, folder)
    json.dumps(report, allow_nan=False)
    reports = report.get("tensors") or report["layers"]
    stored = stored_tensors(folder)
    assert stored
    for tensor, values in stored.items():
        assert np.isfinite(values).all(), tensor
    for layer, of_layer in cases.items():
        said = reports.get(layer) or reports[f"{layer}.weight"]
        useless = of_layer["inputs"] in USELESS
        if recipe.output_statistics != "none":
            useless = useless or of_layer["gradients"] in USELESS
        assert KEY in said or not useless, (layer, of_layer)
        measure = next((key for key in MEASURES if key in said), None)
        if measure and KEY not in said:
            limit = said[f"{recipe.baseline}_{measure}"]
            assert said[measure] <= limit * (1 + TOLERANCE), (layer, of_layer)
    return reports


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RECIPES],
)
def test_degenerate_layers_are_contained(name, degenerate, tmp_path):
    reports = check_recipe(name, degenerate, tmp_path)
    said = " ".join(report.get(KEY, "") for report in reports.values())
    assert "no input reached it" in said
    assert "its inputs are not finite" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_combinations_are_contained(name, seed, source, tmp_path):
    draw = random.Random(seed)
    made = degenerate_model(
        source, tmp_path / "made", lambda number, table: draw.choice(list(table))
    )
    folder = tmp_path / "quantized"
    folder.mkdir()
    check_recipe(name, made, folder)
