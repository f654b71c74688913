"""AWQ's scales of inputs within ggml's grids, against plain references."""

import numpy as np
import pytest
import torch

from quantline.methods.ggml import input_scales as kquant_inputs, quantize as kquant
from quantline.methods.ggml.block_types import dequantize
from quantline.methods.ggml.input_scales import REACHES, search_scales
from quantline.errors import Failure, StageError

WIDTH = 256


def group(seed: int, unlike: float = 1.0, rows: tuple[int, ...] = (8, 4)):
    """Weights [rows, WIDTH] that read one input whose channels differ in size, H, and blocks of each G."""
    draw = np.random.default_rng(seed)
    sizes = np.exp2(np.rint(unlike * draw.normal(size=WIDTH) * 1.5))
    weights = [draw.normal(size=(count, WIDTH)) / sizes for count in rows]
    inputs = draw.normal(size=(4 * WIDTH, WIDTH)) @ (np.eye(WIDTH) + draw.normal(size=(WIDTH, WIDTH)) / 40) * sizes
    gradients = [draw.normal(size=(2, 3 * count, count // 2)) * np.exp(draw.normal(size=count // 2)) for count in rows]
    factors = [one.transpose(0, 2, 1) @ one / one.shape[1] for one in gradients]
    return ([torch.from_numpy(one).float() for one in weights], torch.from_numpy(inputs.T @ inputs / len(inputs)).float(),
            [torch.from_numpy(one).float() for one in factors])


def left(weight, kind, moment, factors, scales, divisor) -> float:
    """tr(G Δ H Δᵀ) of ggml's rounding of the scaled weight, in double with G as one matrix."""
    scaled, importance = (weight * scales / divisor[:, None]).numpy(), (moment.diagonal() / scales**2).numpy()
    stored = dequantize(kquant.quantize(scaled, kind, importance), kind).astype(float)
    difference = stored * divisor[:, None].double().numpy() / scales.double().numpy() - weight.double().numpy()
    outer = torch.block_diag(*factors).double().numpy()
    return float(np.trace(outer @ difference @ moment.double().numpy() @ difference.T))


def ones(weights) -> list[torch.Tensor]:
    return [torch.ones(len(one)) for one in weights]


@pytest.mark.parametrize("kinds", [["Q4_K", "Q6_K"], ["Q2_K", "Q3_K"], ["Q5_0", "Q8_0"], ["IQ4_XS", "IQ4_XS"]])
def test_unlike_channels_are_scaled_and_lose_far_less(kinds):
    weights, moment, factors = group(1)
    scales, reach = search_scales(weights, kinds, moment, factors, ones(weights))
    before, after = (sum(left(weight, kind, moment, factor, some, torch.ones(len(weight)))
                         for weight, kind, factor in zip(weights, kinds, factors, strict=True))
                     for some in (torch.ones(WIDTH), scales))
    assert reach > 0 and after < 0.7 * before


def test_it_is_the_reach_that_leaves_the_least_among_those_that_harm_no_layer():
    weights, moment, factors = group(2)
    kinds, divisors = ["Q3_K", "Q4_K"], [torch.rand(len(one)) + 0.5 for one in weights]
    found, reach = search_scales(weights, kinds, moment, factors, divisors)
    logs, totals = kquant_inputs.direction(weights, kinds, moment, factors), {}
    plain = [left(*parts, torch.ones(WIDTH), torch.ones(len(parts[0])))
             for parts in zip(weights, kinds, [moment] * 2, factors, strict=True)]
    for share in REACHES:
        scales = (logs * share).exp()
        scales = scales / (scales.max() * scales.min()).sqrt()
        each = [left(*parts[:4], scales, parts[4]) for parts in zip(weights, kinds, [moment] * 2, factors, divisors, strict=True)]
        if share == 0 or all(one <= limit for one, limit in zip(each, plain, strict=True)):
            totals[share] = sum(each)
        if share == reach:
            assert torch.equal(scales, found)
    assert reach == min(totals, key=totals.get)


def test_outputs_count_by_their_gradients_and_by_the_step_of_their_grid(monkeypatch):
    """Two bits make steps 254 / 3 times as wide as eight, and errors the square of that; groups are the wider sub-blocks."""
    weights, moment, factors = group(3)
    told = []
    monkeypatch.setattr(kquant_inputs, "expected_scales", lambda *given: told.append(given) or torch.ones(WIDTH))
    kquant_inputs.direction(weights, ["Q2_K", "Q8_0"], moment, factors)
    group_size, importance = told[0][2], told[0][4]
    assert group_size == 32
    for found, factor, steps in zip(importance, factors, (3, 254), strict=True):
        wanted = torch.block_diag(*factor).diagonal() / steps**2
        assert torch.allclose(found, wanted)


def test_no_layer_is_left_with_more_than_ggml_leaves_it(monkeypatch):
    """With a direction that helps one layer and harms the other there is no scaling."""
    weights, moment, factors = group(4, unlike=0)
    draw = torch.Generator().manual_seed(0)
    wild = torch.exp2(torch.randn(WIDTH, generator=draw) * 2)
    weights[0], factors[0] = weights[0] / wild * 100, factors[0] * 100
    monkeypatch.setattr(kquant_inputs, "expected_scales", lambda *rest: wild)
    gain = [left(weight, "Q4_K", moment, factor, wild, torch.ones(len(weight)))
            / left(weight, "Q4_K", moment, factor, torch.ones(WIDTH), torch.ones(len(weight)))
            for weight, factor in zip(weights, factors, strict=True)]
    assert gain[0] < 0.9 and gain[1] > 1.1
    scales, reach = search_scales(weights, ["Q4_K", "Q4_K"], moment, factors, ones(weights))
    assert reach == 0 and torch.equal(scales, torch.ones(WIDTH))


def test_weights_that_are_not_finite_are_refused():
    weights, moment, factors = group(5)
    weights[1][0, 0] = np.nan
    with pytest.raises(StageError, match="not finite") as caught:
        search_scales(weights, ["Q4_K", "Q4_K"], moment, factors, ones(weights))
    assert caught.value.failure == Failure.NON_FINITE
