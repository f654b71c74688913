"""Round to nearest against its definition, and in numpy against torch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quantline.methods.integer import rtn_numpy
from quantline.methods.integer.grid import Grid
from quantline.methods.integer.round_to_nearest import round_to_nearest
from tests.helpers.layers import uneven_layer

GRIDS = [
    Grid(bits, group_size, symmetric)
    for bits in (2, 3, 4, 8)
    for group_size in (16, 64)
    for symmetric in (True, False)
]
WEIGHTS = arrays.arrays(np.float32, (3, 64), elements=st.floats(-4, 4, width=32))


@given(st.integers(0, 2**32 - 1), st.sampled_from(GRIDS))
def test_round_to_nearest_takes_the_nearest_point_and_stays_on_the_grid(seed, grid):
    weight, _ = uneven_layer(seed % 1000, rows=3)
    linear = round_to_nearest(weight, grid)
    scale = np.repeat(linear.scales, grid.group_size, 1)
    zero = np.repeat(linear.zeros, grid.group_size, 1).astype(np.float32)
    points = (np.arange(2**grid.bits)[:, None, None] - zero) * scale
    nearest = np.abs(points - weight.numpy()).min(0)
    assert np.allclose(np.abs(linear.dequantize() - weight.numpy()), nearest, atol=1e-6)
    scales = torch.from_numpy(linear.scales)
    assert torch.equal(scales, scales.bfloat16().float())
    assert (linear.zeros == 2 ** (grid.bits - 1)).all() or not grid.symmetric


@pytest.mark.parametrize("symmetric", [False, True])
@given(
    weight=WEIGHTS,
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group_size=st.sampled_from([16, 32, 64]),
)
def test_round_to_nearest_in_numpy_gives_the_bits_of_torch(symmetric, weight, bits, group_size):
    by_torch = round_to_nearest(torch.from_numpy(weight), Grid(bits, group_size, symmetric))
    by_numpy = rtn_numpy.round_to_nearest(weight, bits, group_size, symmetric)
    np.testing.assert_array_equal(by_numpy, by_torch.dequantize())
