"""Eight bits per weight."""

import numpy as np

from quantline.methods.integer.int8 import round_to_int8
from tests.helpers.layers import uneven_layer


def test_round_to_int8_has_one_symmetric_scale_per_output():
    weight, _ = uneven_layer(10)
    linear = round_to_int8(weight)
    assert linear.scales.shape == (24, 1) and (linear.zeros == 128).all()
    off = np.abs(linear.dequantize() - weight.numpy())
    assert off.max() <= linear.scales.max() * 0.5001
