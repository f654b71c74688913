"""The check that no layer is worse than plain rounding."""

import numpy as np
import pytest
import torch

from quantline.errors import Failure, StageError
from quantline.methods.integer.grid import Grid
from quantline.methods.integer.round_to_nearest import round_to_nearest
from quantline.methods.method import LayerStatistics
from quantline.recipes.layer_report import LayerJudge, check_gain


def test_check_gain_looks_at_what_the_recipe_minimizes():
    report = {"error": 3.0, "rtn_error": 2.0, "divergence": 1.0, "rtn_divergence": 1.0}
    check_gain("q_proj", report, "rtn")
    changes = {"output_change": 2.0, "rtn_output_change": 1.0}
    with pytest.raises(StageError, match="q_proj has the output_change 2, more than"):
        check_gain("q_proj", report | changes, "rtn")
    del report["divergence"], report["rtn_divergence"]
    with pytest.raises(StageError) as caught:
        check_gain("q_proj", report, "rtn")
    assert caught.value.failure == Failure.WORSE_THAN_ROUND_TO_NEAREST
    assert str(caught.value) == (
        "q_proj has the error 3, more than round-to-nearest's 2; calibrate on more text, or use rtn"
    )


def test_check_gain_names_the_baseline_of_the_recipe():
    report = {"divergence": 2.0, "ggml_divergence": 1.0, "error": 0.0, "ggml_error": 1.0}
    with pytest.raises(StageError, match=r"ggml's own rounding's 1; .* or use kquant"):
        check_gain("q_proj", report, "ggml")


@pytest.mark.parametrize("error", [float("nan"), 1.00001])
def test_check_gain_refuses_nan_and_all_that_is_not_rounding(error):
    check_gain("q_proj", {"error": 1 + 1e-7, "rtn_error": 1.0}, "rtn")
    with pytest.raises(StageError):
        check_gain("q_proj", {"error": error, "rtn_error": 1.0}, "rtn")


def test_the_judge_gives_the_errors_of_a_plain_reference():
    rng = np.random.default_rng(0)
    weight, plain, stored = torch.tensor(rng.standard_normal((3, 4, 8)), dtype=torch.float32)
    inputs = torch.tensor(rng.standard_normal((20, 8)), dtype=torch.float32)
    fisher = torch.stack([torch.eye(2) * 2, torch.eye(2) * 3])
    statistics = LayerStatistics("q_proj", inputs.T @ inputs, fisher)
    linear = round_to_nearest(weight, Grid(4, 8, symmetric=False))
    report = LayerJudge(weight, plain, statistics).report(linear, stored, {"tokens": 20}, None)
    by_output = ((inputs @ (stored - weight).T) ** 2).sum(0)
    plainly = ((inputs @ (plain - weight).T) ** 2).sum(0)
    counted = torch.tensor([2.0, 2.0, 3.0, 3.0])
    assert report["error"] == pytest.approx(float(by_output.sum()))
    assert report["divergence"] == pytest.approx(float(by_output @ counted))
    assert report["rtn_error"] == pytest.approx(float(plainly.sum()))
    assert report["rtn_divergence"] == pytest.approx(float(plainly @ counted))
    same = LayerJudge(weight, plain, statistics).report(linear, plain.clone(), {}, None)
    assert (same["error"], same["divergence"]) == (same["rtn_error"], same["rtn_divergence"])
