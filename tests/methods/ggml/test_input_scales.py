"""AWQ's scales of inputs within ggml's grids, against plain references."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from quantline.errors import Failure, StageError
from quantline.methods.ggml import input_scales
from quantline.methods.ggml.block_types import dequantize_blocks
from quantline.methods.ggml.input_scales import STRENGTHS, search_direction, search_scales
from quantline.methods.ggml.quantize import quantize_blocks

WIDTH = 256
NO_SCALES = torch.ones(WIDTH)


class Group(NamedTuple):
    """Layers that read one input.

    Attributes:
        weights: float32 [rows, WIDTH].
        hessian: float32 [WIDTH, WIDTH].
        fisher_out: G of each, float32 [2, rows / 2, rows / 2].
    """

    weights: list[torch.Tensor]
    hessian: torch.Tensor
    fisher_out: list[torch.Tensor]


def random_group(seed: int, unlike: float = 1.0, rows: tuple[int, ...] = (8, 4)) -> Group:
    """Return layers whose input has channels that differ in size, by 2^(1.5 · unlike)."""
    generator = np.random.default_rng(seed)
    sizes = np.exp2(np.rint(unlike * generator.normal(size=WIDTH) * 1.5))
    weights = [generator.normal(size=(count, WIDTH)) / sizes for count in rows]
    samples = generator.normal(size=(4 * WIDTH, WIDTH))
    mixing = np.eye(WIDTH) + generator.normal(size=(WIDTH, WIDTH)) / 40
    inputs = samples @ mixing * sizes
    fisher_out = []
    for count in rows:
        gradients = generator.normal(size=(2, 3 * count, count // 2))
        gradients *= np.exp(generator.normal(size=count // 2))
        fisher_out.append(gradients.transpose(0, 2, 1) @ gradients / gradients.shape[1])
    return Group(
        [torch.from_numpy(weight).float() for weight in weights],
        torch.from_numpy(inputs.T @ inputs / len(inputs)).float(),
        [torch.from_numpy(factor).float() for factor in fisher_out],
    )


def remaining_divergence(
    weight: torch.Tensor,
    ggml_type: str,
    hessian: torch.Tensor,
    fisher_out: torch.Tensor,
    scales: torch.Tensor,
    divisor: torch.Tensor | None = None,
) -> float:
    """Return tr(G Δ H Δᵀ) of ggml's rounding of the scaled weight, in double, G as one matrix."""
    if divisor is None:
        divisor = torch.ones(len(weight))
    scaled = (weight * scales / divisor[:, None]).numpy()
    importance = (hessian.diagonal() / scales**2).numpy()
    blocks = quantize_blocks(scaled, ggml_type, importance)
    rounded = dequantize_blocks(blocks, ggml_type).astype(float)
    stored = rounded * divisor[:, None].double().numpy() / scales.double().numpy()
    difference = stored - weight.double().numpy()
    outer = torch.block_diag(*fisher_out).double().numpy()
    return float(np.trace(outer @ difference @ hessian.double().numpy() @ difference.T))


def remaining_divergences(
    group: Group,
    ggml_types: list[str],
    scales: torch.Tensor,
    divisors: list[torch.Tensor] | None = None,
) -> list[float]:
    """Return `remaining_divergence` of each layer."""
    values = []
    for number, weight in enumerate(group.weights):
        divisor = None if divisors is None else divisors[number]
        value = remaining_divergence(
            weight, ggml_types[number], group.hessian, group.fisher_out[number], scales, divisor
        )
        values.append(value)
    return values


def ones(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.ones(len(weight)) for weight in weights]


@pytest.mark.parametrize(
    "ggml_types", [["Q4_K", "Q6_K"], ["Q2_K", "Q3_K"], ["Q5_0", "Q8_0"], ["IQ4_XS", "IQ4_XS"]]
)
def test_search_scales_of_unlike_channels_leaves_far_less(ggml_types):
    group = random_group(1)
    scales, strength = search_scales(
        group.weights, ggml_types, group.hessian, group.fisher_out, ones(group.weights)
    )
    before = sum(remaining_divergences(group, ggml_types, NO_SCALES))
    after = sum(remaining_divergences(group, ggml_types, scales))
    assert strength > 0
    assert after < 0.7 * before


def test_search_scales_takes_the_strength_that_leaves_least_and_harms_no_layer():
    group = random_group(2)
    ggml_types = ["Q3_K", "Q4_K"]
    divisors = [torch.rand(len(weight)) + 0.5 for weight in group.weights]
    found, strength = search_scales(
        group.weights, ggml_types, group.hessian, group.fisher_out, divisors
    )
    logs = search_direction(group.weights, ggml_types, group.hessian, group.fisher_out)
    limits = remaining_divergences(group, ggml_types, NO_SCALES)
    totals = {}
    for trial in STRENGTHS:
        scales = (logs * trial).exp()
        scales = scales / (scales.max() * scales.min()).sqrt()
        values = remaining_divergences(group, ggml_types, scales, divisors)
        harmless = all(value <= limit for value, limit in zip(values, limits, strict=True))
        if trial == 0 or harmless:
            totals[trial] = sum(values)
        if trial == strength:
            assert torch.equal(scales, found)
    assert strength == min(totals, key=totals.get)


def test_search_direction_weighs_outputs_by_gradients_and_by_the_step_of_their_grid(monkeypatch):
    """Two bits make steps 254 / 3 times as wide as eight, and errors the square of that.

    Groups are the wider sub-blocks.
    """
    group = random_group(3)
    calls = []

    def listen(*arguments):
        calls.append(arguments)
        return torch.ones(WIDTH)

    monkeypatch.setattr(input_scales, "search_expected_scales", listen)
    search_direction(group.weights, ["Q2_K", "Q8_0"], group.hessian, group.fisher_out)
    _, _, group_size, _, importance = calls[0]
    assert group_size == 32
    for outputs, factor, steps in zip(importance, group.fisher_out, (3, 254), strict=True):
        expected = torch.block_diag(*factor).diagonal() / steps**2
        assert torch.allclose(outputs, expected)


def test_search_scales_leaves_no_layer_with_more_than_ggml_does(monkeypatch):
    """With a direction that helps one layer and harms the other there is no scaling."""
    group = random_group(4, unlike=0)
    generator = torch.Generator().manual_seed(0)
    wild = torch.exp2(torch.randn(WIDTH, generator=generator) * 2)
    group.weights[0] = group.weights[0] / wild * 100
    group.fisher_out[0] = group.fisher_out[0] * 100
    monkeypatch.setattr(input_scales, "search_expected_scales", lambda *arguments: wild)
    ggml_types = ["Q4_K", "Q4_K"]
    before = remaining_divergences(group, ggml_types, NO_SCALES)
    after = remaining_divergences(group, ggml_types, wild)
    assert after[0] / before[0] < 0.9
    assert after[1] / before[1] > 1.1
    scales, strength = search_scales(
        group.weights, ggml_types, group.hessian, group.fisher_out, ones(group.weights)
    )
    assert strength == 0
    assert torch.equal(scales, NO_SCALES)


def test_search_scales_refuses_weights_that_are_not_finite():
    group = random_group(5)
    group.weights[1][0, 0] = np.nan
    with pytest.raises(StageError, match="not finite") as caught:
        search_scales(
            group.weights, ["Q4_K", "Q4_K"], group.hessian, group.fisher_out, ones(group.weights)
        )
    assert caught.value.failure == Failure.NON_FINITE
