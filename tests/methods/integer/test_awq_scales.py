"""The expected error against its definition, its slope against autograd, and the scales."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantline.methods.integer import awq_scales
from quantline.methods.integer.grid import Grid
from quantline.methods.integer.output_error import dequantize_like, output_error
from quantline.methods.integer.round_to_nearest import round_to_nearest


def layer(seed: int, rows: int = 24, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W [rows, width] and H [width, width] of inputs unlike in size."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * width, width, generator=generator) * torch.logspace(-1, 1, width)
    return torch.randn(rows, width, generator=generator), inputs.T @ inputs / len(inputs)


@given(
    st.integers(0, 10_000),
    st.sampled_from([8, 16, 64]),
    st.sampled_from([awq_scales.sum_ranges, awq_scales.sum_ranges_at_once]),
)
def test_expected_error_and_its_slope_are_those_of_the_formula(seed, group_size, sum_ranges):
    generator = torch.Generator().manual_seed(seed)
    weights = [layer(seed + number, 12 * number + 4)[0] for number in range(2)]
    importance = [torch.rand(len(weight), generator=generator) for weight in weights]
    diagonal = torch.rand(64, generator=generator)
    logs = torch.randn(64, generator=generator).double().requires_grad_()
    weights[1][0] = weights[1][0].abs()  # a row whose range starts at zero
    expected = torch.zeros((), dtype=torch.float64)
    for weight, outputs in zip(weights, importance, strict=True):
        groups = (weight * logs.exp()).reshape(len(weight), -1, group_size)
        ranges = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
        input_errors = (diagonal / logs.exp() ** 2).reshape(-1, group_size).sum(1)
        expected = expected + (outputs[:, None] * ranges**2 * input_errors).sum()
    expected.backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(awq_scales, "sum_ranges", sum_ranges)
        scales = logs.detach().float().exp()
        error, slope = awq_scales.expected_error(weights, importance, diagonal, group_size, scales)
    assert float(error) == pytest.approx(expected.item(), rel=1e-4)
    tolerance = 1e-4 * float(logs.grad.abs().max())
    assert torch.allclose(slope.double(), logs.grad, rtol=1e-3, atol=tolerance)


def test_sum_ranges_gives_the_same_for_any_number_of_threads():
    weight, _ = layer(1, rows=13)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(awq_scales.sum_ranges(weight, torch.ones(64), 16, torch.ones(13)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_search_expected_scales_lowers_the_mean_error_over_many_roundings():
    generator = torch.Generator().manual_seed(11)
    weight, hessian = layer(11, rows=8)
    grid = Grid(4, 16, False)
    found = awq_scales.search_expected_scales([weight], hessian, 16, 20, [torch.ones(8)])

    def mean_error(scales: torch.Tensor) -> float:
        errors = []
        for _ in range(40):
            moved = weight + 0.05 * torch.randn(weight.shape, generator=generator)
            rounded = dequantize_like(round_to_nearest(moved * scales, grid), moved) / scales
            errors.append(output_error(moved, rounded, hessian))
        return float(np.mean(errors))

    assert mean_error(found) < 0.9 * mean_error(torch.ones(64))


def test_search_expected_scales_follows_the_outputs_that_matter_more():
    """Two outputs that want opposite scales: the one whose gradient is larger gets them."""
    weight = torch.ones(2, 64)
    weight[0, ::16] = 8.0
    weight[1, 1::16] = 8.0
    for first, second in ((1.0, 100.0), (100.0, 1.0)):
        importance = [torch.tensor([first, second])]
        scales = awq_scales.search_expected_scales([weight], torch.eye(64), 16, 20, importance)
        assert (scales[0] < scales[1]) == (first > second)
