"""Round-to-nearest without torch is the same as with it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quantline.methods.integer import rtn
from quantline.methods.integer.rtn_numpy import nearest

WEIGHTS = arrays.arrays(np.float32, (3, 64), elements=st.floats(-4, 4, width=32))


@pytest.mark.parametrize("symmetric", [False, True])
@given(weight=WEIGHTS, bits=st.sampled_from([2, 3, 4, 5, 6, 8]), group_size=st.sampled_from([16, 32, 64]))
def test_both_give_the_same_bits(symmetric, weight, bits, group_size):
    with_torch = rtn.quantize(torch.from_numpy(weight), bits, group_size, symmetric).dequantize()
    np.testing.assert_array_equal(nearest(weight, bits, group_size, symmetric), with_torch)
