"""AWQ's search of scales: it gains, no layer pays for another, and nothing is scaled in vain."""

import numpy as np
import torch

from quantline.methods.integer import awq
from quantline.methods.integer.awq_clip import quantize_clipped
from quantline.methods.integer.grid import Grid
from quantline.methods.integer.output_error import dequantize_like, output_error
from quantline.methods.integer.round_to_nearest import round_to_nearest
from quantline.methods.method import scale_hessian
from tests.helpers.layers import error_of, uneven_layer

GRID = Grid(3, 16, False)


def test_awq_search_scales_scales_up_what_matters_and_has_less_error_than_rounding():
    weight, hessian = uneven_layer(7, rows=48)
    scales, strength = awq.search_scales([weight[:24], weight[24:]], hessian, GRID, 20)
    assert strength > 0
    assert np.corrcoef(scales.log(), hessian.diagonal().log())[0, 1] > 0.9
    linear = quantize_clipped(weight * scales, scale_hessian(hessian, scales), GRID)
    scaled_back = dequantize_like(linear, weight) / scales
    plain = error_of(round_to_nearest(weight, GRID), weight, hessian)
    assert output_error(weight, scaled_back, hessian) < 0.9 * plain


def test_awq_search_scales_finds_none_where_all_inputs_and_weights_are_alike():
    generator = torch.Generator().manual_seed(8)
    signs = torch.where(torch.rand(24, 64, generator=generator) < 0.5, -1.0, 1.0)
    scales, strength = awq.search_scales([signs], torch.eye(64), Grid(4, 16, False), 20)
    assert strength == 0 and torch.equal(scales, torch.ones(64))


def test_awq_search_scales_lets_no_layer_pay_for_another_that_reads_the_same_input():
    first, hessian = uneven_layer(11)
    generator = torch.Generator().manual_seed(3)
    second = 30 * torch.randn(24, 64, generator=generator) / hessian.diagonal().sqrt()
    scales, _ = awq.search_scales([first, second], hessian, GRID, 20)
    for weight in (first, second):
        rounded = dequantize_like(round_to_nearest(weight * scales, GRID), weight) / scales
        plain = error_of(round_to_nearest(weight, GRID), weight, hessian)
        assert output_error(weight, rounded, hessian) <= plain


def test_awq_search_scales_refuses_divisors_under_which_a_layer_would_be_worse(monkeypatch):
    weight, _ = uneven_layer(12, rows=2)
    monkeypatch.setattr(awq, "search_expected_scales", lambda *args: torch.ones(64))
    grid = Grid(4, 16, False)
    results = []
    for divisor in torch.linspace(1, 2, 40).tolist():
        divisors = [torch.tensor([1.0, divisor])]
        results.append(awq.search_scales([weight], torch.eye(64), grid, 2, divisors))
    # Scales in bfloat16 make some divisors worse by a little.
    assert results[0] is not None and None in results
