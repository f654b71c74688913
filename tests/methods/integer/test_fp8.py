"""Eight-bit floats."""

import ml_dtypes
import numpy as np
import torch

from quantline.methods.integer.fp8 import round_to_float8
from tests.helpers.layers import uneven_layer


def test_round_to_float8_is_off_by_half_a_step_of_its_mantissa_at_most():
    weight, _ = uneven_layer(10)
    weight[3] *= 1e-3
    linear = round_to_float8(weight)
    stored = torch.from_numpy(linear.dequantize())
    largest = weight.abs().amax(1, keepdim=True)
    finest = largest / 448 * 2**-9  # the format's finest step, which small weights have
    half_step = torch.maximum(weight.abs() * 2**-4, finest)
    assert ((stored - weight).abs() <= half_step * 1.01).all()
    assert linear.values.dtype == ml_dtypes.float8_e4m3fn
    assert linear.scales.shape == (24, 1)


def test_round_to_float8_keeps_every_weight_within_its_range():
    """Scales that bfloat16 rounds down put the largest weight beyond 448: a NaN of the format."""
    weight = torch.linspace(1, 2, 300)[:, None] * torch.tensor([[1.0, -0.5]])
    stored = round_to_float8(weight).dequantize()
    assert np.isfinite(stored).all()
    assert np.abs(stored - weight.numpy()).max() < 0.1
