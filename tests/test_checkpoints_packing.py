"""Packed symmetric matrices come back within half precision, and still positive definite with the damping."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantline.calibration.packing import pack, unpack


def moments(seed: int, width: int, samples: int) -> np.ndarray:
    """Second moments of correlated inputs whose channels differ in size by a factor of a million."""
    draw = np.random.default_rng(seed)
    inputs = draw.normal(size=(samples, width)) @ draw.normal(size=(width, width)) * np.geomspace(1e-3, 1e3, width)
    return (inputs.T @ inputs / samples).astype(np.float32)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_entries_come_back_within_half_precision_of_their_channels(seed, width):
    wanted = moments(seed, width, 20)
    found = unpack(*pack(wanted))
    size = np.sqrt(np.diagonal(wanted))
    assert np.array_equal(np.diagonal(found), np.diagonal(wanted))
    assert np.abs((found - wanted) / np.outer(size, size)).max() <= 2**-10  # two factors, each off by half of that


def test_blocks_are_packed_one_by_one():
    blocks = np.stack([moments(seed, 6, 20) for seed in range(3)])
    diagonal, triangle = pack(blocks)
    assert diagonal.shape == (3, 6) and triangle.shape == (3, 21) and triangle.dtype == np.float16
    for block, found in zip(blocks, unpack(diagonal, triangle), strict=True):
        assert np.allclose(found, unpack(*pack(block)), rtol=1e-6)


def test_an_input_that_is_always_zero():
    wanted = moments(0, 5, 20)
    wanted[2] = wanted[:, 2] = 0
    assert np.allclose(unpack(*pack(wanted)), wanted, rtol=1e-2, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("width", [64, 512])
def test_moments_of_few_tokens_stay_positive_definite(width):
    """Correlations rounded one by one would have negative eigenvalues of about 2^-12 of the largest channels'."""
    found = unpack(*pack(moments(1, width, width // 4))).astype(np.float64)  # singular before
    size = np.sqrt(np.diagonal(found))
    assert np.linalg.eigvalsh(found / np.outer(size, size)).min() > -1e-6
