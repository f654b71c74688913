"""What a method is given of a layer, by its recipe and by the calibration."""

import numpy as np
import pytest
import torch

from quantline.config.recipes import SHRINKAGE, parse_recipe
from quantline.errors import Failure, StageError
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.store import QuantizedWriter
from quantline.recipes.context import QuantizationContext
from tests.helpers.calibrated import calibrate_into
from tests.helpers.quantized import tokens_of

LAYER = "model.layers.1.mlp.up_proj"
GRID = {"bits": 4, "group_size": -1, "symmetric": False}


@pytest.fixture(scope="module", params=[0, None], ids=["gradients", "no gradients"])
def calibrated(request, tmp_path_factory, tiny_narrow):
    """(checkpoint, its calibration)."""
    folder = tmp_path_factory.mktemp("context") / "calibration"
    checkpoint = Checkpoint(tiny_narrow)
    return checkpoint, calibrate_into(folder, checkpoint, tokens_of(checkpoint), request.param)


def context(calibrated, tmp_path, **recipe) -> QuantizationContext:
    checkpoint, calibration = calibrated
    options = parse_recipe(GRID | recipe)
    writer = QuantizedWriter(tmp_path)
    return QuantizationContext(options, checkpoint, checkpoint.arch, calibration, writer)


def test_fisher_out_is_what_the_recipe_looks_at(calibrated, tmp_path):
    has_gradients = calibrated[1].has_gradients
    assert context(calibrated, tmp_path, method="gptq").fisher_out(LAYER) is None
    awq = context(calibrated, tmp_path, method="awq")
    curved = context(calibrated, tmp_path, method="awq", curvature=True)
    importance = awq.output_importance(LAYER)
    assert importance.shape == (176,)
    if has_gradients:
        assert torch.equal(awq.fisher_out(LAYER), importance[:, None, None])
        assert curved.fisher_out(LAYER).shape == (1, 176, 176)
    else:
        assert awq.fisher_out(LAYER) is None
        assert torch.equal(importance, torch.ones(176))
        with pytest.raises(StageError, match=r"set calibration\.curvature=true") as caught:
            curved.fisher_out(LAYER)
        assert caught.value.failure == Failure.CALIBRATION_EMPTY


def test_statistics_read_the_calibration(calibrated, tmp_path):
    ctx = context(calibrated, tmp_path, method="awq")
    hessian = ctx.hessian(LAYER)
    statistics = ctx.statistics(LAYER, hessian)
    assert statistics.layer == LAYER and statistics.hessian is hessian
    assert (statistics.fisher_out is not None) == calibrated[1].has_gradients
    assert statistics.input_peak.shape == (64,)
    assert statistics.input_sample.shape[1] == 64
    assert torch.equal(statistics.output_importance, ctx.output_importance(LAYER))
    assert ctx.statistics_without_fisher(LAYER, hessian).fisher_out is None


def test_methods_get_the_moments_shrunk_as_the_recipe_says(calibrated, tmp_path):
    whole = calibrated[1].hessian(LAYER).copy()
    beside = ~np.eye(len(whole), dtype=bool)
    for number, (options, kept) in enumerate(
        [({"shrinkage": 0.5}, 0.5), ({"shrinkage": 0.0}, 1.0), ({}, 1 - SHRINKAGE)]
    ):
        folder = tmp_path / str(number)
        ctx = context(calibrated, folder, method="gptq", **options)
        hessian = ctx.hessian(LAYER).numpy()
        np.testing.assert_allclose(hessian[beside], kept * whole[beside], rtol=1e-6)
        np.testing.assert_array_equal(hessian.diagonal(), whole.diagonal())


def test_recipe_of_a_layer_has_the_grid_that_a_budget_chose(calibrated, tmp_path):
    ctx = context(calibrated, tmp_path, method="gptq")
    ctx.grids[LAYER] = {"bits": 3, "group_size": 32}
    assert (ctx.recipe_of(LAYER).bits, ctx.recipe_of(LAYER).group_size) == (3, 32)
    assert ctx.method_of(LAYER).recipe.bits == 3
    assert ctx.method_of("model.layers.0.mlp.up_proj").recipe == ctx.recipe
