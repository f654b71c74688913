"""SmoothQuant against what a server makes of it, written out."""

import pytest
import torch

from quantline.methods.integer import smoothquant
from quantline.methods.integer.int8 import round_to_int8


def loud_inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W [24, 64] and inputs [200, 64]; two channels are a hundred times as large."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 64, generator=generator)
    inputs[:, [5, 40]] *= 100
    return torch.randn(24, 64, generator=generator), inputs


def test_smoothquant_changes_outputs_less_where_some_inputs_are_loud():
    weight, inputs = loud_inputs(0)
    peak = inputs.abs().amax(0)
    scales, exponent = smoothquant.search_scales([weight], peak, inputs, 20, None)
    assert exponent is not None and scales[5] > 5 * scales[6]

    def change(scales: torch.Tensor) -> float:
        """Round each token and each output with a step of its own."""
        scaled_inputs = inputs / scales
        scaled_weight = weight * scales
        input_step = scaled_inputs.abs().amax(1, keepdim=True) / 127.5
        weight_step = scaled_weight.abs().amax(1, keepdim=True) / 127
        rounded_inputs = (scaled_inputs / input_step).round() * input_step
        rounded_weight = (scaled_weight / weight_step).round() * weight_step
        outputs = rounded_inputs @ rounded_weight.T
        return float(((outputs - inputs @ weight.T) ** 2).sum(1).mean())

    assert change(scales) < 0.2 * change(torch.ones(64))
    stored = torch.from_numpy(round_to_int8(weight * scales).dequantize())
    found = smoothquant.output_change(weight, stored, inputs, scales)
    assert found == pytest.approx(change(scales), rel=0.1)


def test_smoothquant_takes_the_exponent_that_was_asked_for():
    weight, inputs = loud_inputs(1)
    peak = inputs.abs().amax(0)
    scales, exponent = smoothquant.search_scales([weight], peak, inputs, 20, 0.5)
    expected = (peak / weight.abs().amax(0)).sqrt()
    assert exponent == 0.5
    assert torch.allclose(scales / scales[0], expected / expected[0], rtol=1e-4)


def test_smoothquant_scales_nothing_where_all_is_alike():
    weight, inputs = loud_inputs(2)
    inputs = inputs.sign()
    peak = inputs.abs().amax(0)
    scales, exponent = smoothquant.search_scales([weight.sign()], peak, inputs, 20, None)
    assert exponent is None and torch.equal(scales, torch.ones(64))
