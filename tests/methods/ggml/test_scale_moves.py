"""What the compiled moves of scales round to."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quantline.methods.ggml.scale_moves import round_to_float16

LARGE = st.floats(-70000, 70000, width=32)
SUBNORMAL = st.floats(-(2.0**-13), 2.0**-13, width=32)


@given(LARGE | SUBNORMAL)
def test_round_to_float16_is_numpys(value):
    with np.errstate(over="ignore"):
        expected = np.float32(np.float16(value))
    assert np.float32(round_to_float16(np.float32(value))) == expected
