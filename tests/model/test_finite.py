"""Whether numbers are finite: what numpy says, for every number of 16 bits."""

import ml_dtypes
import numpy as np
import pytest

from quantline.model.finite import CHUNK, all_finite

TYPES = (ml_dtypes.bfloat16, np.float16)


@pytest.mark.parametrize("dtype", TYPES)
def test_all_finite_knows_every_number_of_16_bits(dtype):
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    is_finite = np.isfinite(every)
    assert all_finite(every[is_finite])
    assert not any(all_finite(one) for one in every[~is_finite].reshape(-1, 1)[::7])


@pytest.mark.parametrize("dtype", [*TYPES, np.float32])
@pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK, -1])
def test_all_finite_finds_one_among_many(dtype, place):
    values = np.zeros((3, CHUNK // 2 + 5), dtype)
    assert all_finite(values)
    assert all_finite(values.T)
    values.reshape(-1)[place] = np.nan
    assert not all_finite(values)
    assert not all_finite(values.T)


def test_all_finite_of_a_single_number_and_of_none():
    assert all_finite(np.array(1, ml_dtypes.bfloat16))
    assert not all_finite(np.array(np.inf, np.float16))
    assert all_finite(np.zeros((0, 4), ml_dtypes.bfloat16))
