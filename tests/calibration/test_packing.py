"""Packed symmetric matrices come back within half precision, positive definite with the damping."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantline.calibration import packing
from quantline.calibration.packing import pack, unpack
from quantline.model import triangular


def correlated_moments(seed: int, width: int, samples: int) -> np.ndarray:
    """Return second moments of correlated inputs whose channels differ by a factor of a million."""
    generator = np.random.default_rng(seed)
    independent = generator.normal(size=(samples, width))
    mixing = generator.normal(size=(width, width))
    inputs = independent @ mixing * np.geomspace(1e-3, 1e3, width)
    return (inputs.T @ inputs / samples).astype(np.float32)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_unpack_gives_entries_within_half_precision_of_their_channels(seed, width):
    moments = correlated_moments(seed, width, 20)
    unpacked = unpack(*pack(moments))
    size = np.sqrt(np.diagonal(moments))
    assert np.array_equal(np.diagonal(unpacked), np.diagonal(moments))
    # The product of two factors, each off by half of that.
    assert np.abs((unpacked - moments) / np.outer(size, size)).max() <= 2**-10


def test_unpack_multiplies_some_columns_at_once(monkeypatch):
    packed = pack(np.stack([correlated_moments(seed, 23, 40) for seed in range(2)]))
    whole = unpack(*packed)
    monkeypatch.setattr(packing, "COLUMNS", 5)
    assert np.allclose(unpack(*packed), whole, rtol=1e-4, atol=0)
    assert not np.array_equal(unpack(*packed), whole)


def test_pack_takes_blocks_one_by_one():
    blocks = np.stack([correlated_moments(seed, 6, 20) for seed in range(3)])
    diagonal, triangle = pack(blocks)
    assert diagonal.shape == (3, 6)
    assert triangle.shape == (3, 21)
    assert triangle.dtype == np.float16
    for block, unpacked in zip(blocks, unpack(diagonal, triangle), strict=True):
        assert np.allclose(unpacked, unpack(*pack(block)), rtol=1e-6)


def test_pack_takes_an_input_that_is_always_zero():
    moments = correlated_moments(0, 5, 20)
    moments[2] = 0
    moments[:, 2] = 0
    tolerance = 1e-5 * np.abs(moments).max()
    assert np.allclose(unpack(*pack(moments)), moments, rtol=1e-2, atol=tolerance)


@pytest.mark.parametrize("width", [64, 512])
def test_unpack_keeps_moments_of_few_tokens_positive_definite(width):
    """Correlations that are rounded one by one would have negative eigenvalues.

    They would be about 2^-12 of the largest channels'.
    """
    singular = correlated_moments(1, width, width // 4)
    unpacked = unpack(*pack(singular)).astype(np.float64)
    size = np.sqrt(np.diagonal(unpacked))
    assert np.linalg.eigvalsh(unpacked / np.outer(size, size)).min() > -1e-6


def test_pack_takes_a_matrix_of_more_columns_than_are_factored_at_once(monkeypatch):
    moments = correlated_moments(3, 40, 90)
    whole = pack(moments)
    monkeypatch.setattr(triangular, "BLOCK", 16)
    diagonal, triangle = pack(moments)
    assert np.array_equal(diagonal, whole[0])
    assert np.allclose(triangle, whole[1], rtol=2**-10, atol=2**-20)
    few = pack(correlated_moments(4, 40, 5))  # singular: it takes some damping
    assert np.isfinite(few[1]).all()
    assert np.linalg.eigvalsh(unpack(*few).astype(np.float64)).min() > -1e-3
