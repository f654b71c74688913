"""The grid of a layer: which group sizes fit it, and that zero is always a point."""

import pytest
import torch

from quantline.errors import Failure, StageError
from quantline.methods.gptq import GptqRecipe
from quantline.methods.integer.grid import Grid, grid_for
from quantline.methods.integer.round_to_nearest import round_to_nearest
from tests.helpers.layers import uneven_layer

GRIDS = [
    Grid(bits, group_size, symmetric)
    for bits in (2, 3, 4, 8)
    for group_size in (16, 64)
    for symmetric in (True, False)
]


def recipe(group_size: int) -> GptqRecipe:
    return GptqRecipe(method="gptq", bits=3, group_size=group_size, symmetric=False)


def test_grid_for_has_the_recipe_and_the_whole_row_for_minus_one():
    assert grid_for("x", recipe(64), 256) == Grid(3, 64, False)
    assert grid_for("x", recipe(-1), 100) == Grid(3, 100, False)
    assert Grid(3, 64, False).max_int == 7 and Grid(3, 64, True).middle == 4


def test_grid_for_refuses_groups_that_do_not_divide_the_row_and_says_which_do():
    with pytest.raises(StageError, match="group_size can be 32 here") as caught:
        grid_for("model.layers.0.mlp.down_proj", recipe(128), 352)
    assert caught.value.failure == Failure.UNSUPPORTED_WIDTH
    assert "down_proj has rows of 352" in str(caught.value)
    with pytest.raises(StageError, match="the whole row"):
        grid_for("x", recipe(128), 100)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_fit_range_makes_zero_a_point_of_every_grid(grid):
    weight = uneven_layer(0)[0].abs() + 1  # no zero and no negative weight
    weight[:, ::7] = 0
    assert (round_to_nearest(weight, grid).dequantize()[:, ::7] == 0).all()


def test_fit_range_of_zeros_stays_zero():
    assert not round_to_nearest(torch.zeros(2, 32), Grid(4, 32, True)).dequantize().any()
