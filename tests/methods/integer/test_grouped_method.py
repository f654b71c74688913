"""The methods of recipes: what each does with a layer, by the options of its recipe."""

import numpy as np
import pytest
import torch

from quantline.config.recipes import RECIPES, parse_recipe
from quantline.errors import Failure, StageError
from quantline.methods.integer import awq_clip, curvature, gptq
from quantline.methods.integer.fp8 import round_to_float8
from quantline.methods.integer.grid import Grid
from quantline.methods.integer.int8 import round_to_int8
from quantline.methods.integer.round_to_nearest import round_to_nearest
from quantline.methods.method import InputScalingMethod, LayerStatistics, Method, load_method
from tests.helpers.layers import correlated_moments, uneven_layer

GRID = Grid(3, 32, False)
IN_GROUPS = {"bits": 3, "group_size": 32, "symmetric": False}


def quantize(weight: torch.Tensor, statistics: LayerStatistics, **options):
    """Quantize a weight as the drivers do, by the recipe's method."""
    grid = IN_GROUPS if options["method"] in ("rtn", "gptq", "awq") else {}
    method = load_method(parse_recipe(grid | options))
    return method.quantize(weight, statistics, method.prepare(statistics.hessian))


def statistics_of(hessian: torch.Tensor, rows: int = 24, **others) -> LayerStatistics:
    fisher_out = correlated_moments(rows, torch.Generator().manual_seed(0))[None]
    return LayerStatistics("q_proj", hessian, fisher_out, **others)


def same(first, second) -> bool:
    parts = second.parts()
    return all(np.array_equal(values, parts[part]) for part, values in first.parts().items())


def test_every_recipe_of_integers_and_floats_names_a_method():
    recipes = [recipe for recipe in RECIPES.values() if recipe.storage not in ("none", "ggml")]
    assert len(recipes) >= 6
    for recipe in recipes:
        method = load_method(recipe.model_construct())
        assert isinstance(method, Method)
        assert isinstance(method, InputScalingMethod) == recipe.scales_inputs


def test_methods_round_by_their_recipes():
    weight, hessian = uneven_layer(0)
    statistics = statistics_of(hessian)
    factor = gptq.factorize(hessian)
    ordered = gptq.factorize(hessian, act_order=False, damping=0.1)
    diagonal = hessian.diagonal()
    by_gptq = gptq.quantize(weight, hessian, GRID, factor)
    plain_gptq = gptq.quantize(weight, hessian, GRID, ordered, weighted=False)
    expected = [
        ({"method": "rtn"}, round_to_nearest(weight, GRID)),
        ({"method": "rtn", "scales": "weighted"}, round_to_nearest(weight, GRID, diagonal)),
        ({"method": "gptq"}, gptq.improve(by_gptq, weight, hessian, factor)),
        (
            {"method": "gptq", "act_order": False, "damping": 0.1, "scales": "minmax"},
            gptq.improve(plain_gptq, weight, hessian, ordered),
        ),
        ({"method": "awq"}, awq_clip.quantize_clipped(weight, hessian, GRID)),
        ({"method": "awq", "scales": "minmax"}, round_to_nearest(weight, GRID)),
        (
            {"method": "awq", "rounding": "gptq"},
            gptq.improve(by_gptq, weight, hessian, factor),
        ),
        ({"method": "int8"}, round_to_int8(weight)),
        ({"method": "smoothquant"}, round_to_int8(weight)),
        ({"method": "fp8"}, round_to_float8(weight)),
    ]
    for options, linear in expected:
        assert same(quantize(weight, statistics, **options), linear), options


def test_methods_refine_by_curvature_where_the_recipe_wants_it_and_g_is_there():
    weight, hessian = uneven_layer(1)
    statistics = statistics_of(hessian)
    factor = gptq.factorize(hessian)
    linear = gptq.quantize(weight, hessian, GRID, factor)
    refined = curvature.refine(linear, weight, hessian, statistics.fisher_out)
    improved = gptq.improve(linear, weight, hessian, factor)
    assert not same(refined, improved)
    options = {"method": "gptq", "curvature": True}
    assert same(quantize(weight, statistics, **options), refined)
    assert same(quantize(weight, statistics.without_fisher(), **options), improved)
    assert same(quantize(weight, statistics, method="gptq"), improved)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "int8", "smoothquant", "fp8"])
def test_methods_refuse_weights_that_are_not_finite(method):
    weight, hessian = uneven_layer(2)
    weight[3, 4] = float("nan")
    with pytest.raises(StageError, match="the weight of q_proj is not finite") as caught:
        quantize(weight, statistics_of(hessian), method=method)
    assert caught.value.failure == Failure.NON_FINITE


def test_methods_round_plainly_for_the_report():
    weight, _ = uneven_layer(3)
    for method in ("rtn", "gptq", "awq"):
        grouped = load_method(parse_recipe({"method": method, **IN_GROUPS, "scales": "minmax"}))
        assert same(grouped.quantize_baseline("q_proj", weight), round_to_nearest(weight, GRID))
    for method, plain in (
        ("int8", round_to_int8(weight)),
        ("smoothquant", round_to_int8(weight)),
        ("fp8", round_to_float8(weight)),
    ):
        loaded = load_method(parse_recipe({"method": method}))
        assert same(loaded.quantize_baseline("q_proj", weight), plain)
