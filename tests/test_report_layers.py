"""Errors layer by layer in the report, and where those of ggml's types come from."""

import numpy as np
import pytest
import torch

from quantline.methods.ggml import quantize as kquant
from quantline.methods.integer import rtn
from quantline.methods.ggml.block_types import dequantize, grid_like
from quantline.recipes import ggml
from quantline.recipes.ggml import blocks_report
from quantline.report import layers


def manifest(**told: dict) -> dict:
    return {"layers": told, "tensors": {f"{name}.weight": {"actual": "Q4_K", "bits_per_weight": 4.5} for name in told}}


def test_the_measure_is_the_one_that_the_recipe_minimizes():
    both = {"error": 1.0, "rtn_error": 2.0, "divergence": 3.0, "rtn_divergence": 6.0}
    (one,) = layers.worst(manifest(a=both))
    assert one == {"name": "a", "type": "Q4_K", "bits": 4.5, "measure": "tr(G ΔW H ΔWᵀ)", "error": 3.0,
                   "plain": "round-to-nearest", "plain_error": 6.0}
    (one,) = layers.worst(manifest(a={"error": 1.0, "ggml_error": 2.0}))
    assert (one["measure"], one["plain"], one["plain_error"]) == ("tr(ΔW H ΔWᵀ)", "ggml's own rounding", 2.0)
    (one,) = layers.worst(manifest(a={"diagonal_error": 1.0, "rtn_diagonal_error": None}))
    assert (one["measure"], one["plain_error"]) == ("Σ ΔW² diag(H)", None)
    assert layers.worst(manifest()) == layers.worst(manifest(a={"requested": "F32"})) == []


def test_the_worst_come_first_and_the_rest_is_left_to_the_manifest():
    told = {f"layer-{n}": {"error": float(n), "rtn_error": 9.0} for n in range(20)}
    found = layers.worst(manifest(**told, norm={}))
    assert [one["name"] for one in found] == [f"layer-{n}" for n in range(19, 19 - layers.WORST, -1)]


class Calibrated:
    """What `blocks_report` asks of a recipe's work."""

    def __init__(self, squares: np.ndarray) -> None:
        self.moments, self.layers, self.squares = self, ["q_proj"], squares

    def diagonal(self, _: str) -> np.ndarray:
        return self.squares


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "IQ4_NL", "IQ3_XXS"])
def test_the_error_of_blocks_is_that_of_what_they_stand_for(kind):
    draw = np.random.default_rng(1)
    weight = draw.standard_normal((6, 512), np.float32)
    squares = draw.exponential(size=512).astype(np.float32) ** 2
    data = kquant.quantize(weight, kind, squares)
    told = blocks_report(Calibrated(squares), "q_proj", weight, kind, data)
    expected = float((((dequantize(data, kind) - weight).astype(np.float64)) ** 2 * squares).sum())
    assert told["diagonal_error"] == pytest.approx(expected, rel=1e-5)
    assert told["error_rows"] == 6
    if kind.startswith("IQ"):
        assert told["rtn_diagonal_error"] is None and grid_like(kind) is None
    else:
        naive = rtn.quantize(torch.from_numpy(weight), *grid_like(kind)).dequantize()
        assert told["rtn_diagonal_error"] == pytest.approx(float(((naive - weight) ** 2 @ squares).sum()), rel=1e-4)


def test_of_a_tall_matrix_some_rows_stand_for_all(monkeypatch):
    weight, squares = np.random.default_rng(3).standard_normal((400, 256), np.float32), np.ones(256, np.float32)
    data = kquant.quantize(weight, "Q4_K", squares)
    whole = blocks_report(Calibrated(squares), "q_proj", weight, "Q4_K", data)
    monkeypatch.setattr(ggml, "ERROR_ROWS", 100)
    some = blocks_report(Calibrated(squares), "q_proj", weight, "Q4_K", data)
    assert (whole["error_rows"], some["error_rows"]) == (400, 100)
    for figure in ("diagonal_error", "rtn_diagonal_error"):
        assert some[figure] == pytest.approx(whole[figure], rel=0.05) and some[figure] != whole[figure]


def test_importance_lowers_the_error_that_is_told():
    draw = np.random.default_rng(2)
    weight, squares = draw.standard_normal((8, 512), np.float32), draw.exponential(size=512).astype(np.float32) ** 3
    errors = [blocks_report(Calibrated(squares), "q_proj", weight, "Q3_K", kquant.quantize(weight, "Q3_K", how))["diagonal_error"]
              for how in (squares, None)]
    assert errors[0] < errors[1]


def test_nothing_is_told_of_what_was_not_calibrated_or_not_rounded():
    weight = np.ones((2, 256), np.float32)
    assert blocks_report(Calibrated(weight[0]), "embed", weight, "Q8_0", kquant.quantize(weight, "Q8_0")) == {}
    assert blocks_report(Calibrated(weight[0]), "q_proj", weight, "F16", weight.astype(np.float16).view(np.uint8)) == {}


def test_the_grid_that_a_type_refines():
    assert {kind: grid_like(kind) for kind in ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0", "Q4_0", "Q5_1")} == {
        "Q2_K": (2, 16, False), "Q3_K": (3, 16, True), "Q4_K": (4, 32, False), "Q6_K": (6, 16, True),
        "Q8_0": (8, 32, True), "Q4_0": (4, 32, True), "Q5_1": (5, 32, False)}
