"""The expected error of rounding against its definition, its slope against autograd, and the scales against both."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantline.methods.integer import awq_scales as expected, rtn
from quantline.methods.integer.grid import output_error


def layer(seed: int, rows: int = 24, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [rows, width] and H [width, width] of inputs unlike in size."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * width, width, generator=draw) * torch.logspace(-1, 1, width)
    return torch.randn(rows, width, generator=draw), inputs.T @ inputs / len(inputs)


@given(st.integers(0, 10_000), st.sampled_from([8, 16, 64]), st.sampled_from([expected.felt, expected.felt_at_once]))
def test_the_error_and_its_slope_are_those_of_the_formula(seed, group, felt):
    draw = torch.Generator().manual_seed(seed)
    parts = [layer(seed + number, 12 * number + 4)[0] for number in range(2)]
    importance = [torch.rand(len(weight), generator=draw) for weight in parts]
    diagonal, logs = torch.rand(64, generator=draw), torch.randn(64, generator=draw).double().requires_grad_()
    parts[1][0] = parts[1][0].abs()  # a row whose span starts at zero
    wanted = torch.zeros((), dtype=torch.float64)
    for weight, outputs in zip(parts, importance, strict=True):
        grouped = (weight * logs.exp()).reshape(len(weight), -1, group)
        span = grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0)
        wanted = wanted + (outputs[:, None] * span**2 * (diagonal / logs.exp() ** 2).reshape(-1, group).sum(1)).sum()
    wanted.backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expected, "felt", felt)
        found, slope = expected.expected(parts, importance, diagonal, group, logs.detach().float().exp())
    assert float(found) == pytest.approx(wanted.item(), rel=1e-4)
    assert torch.allclose(slope.double(), logs.grad, rtol=1e-3, atol=1e-4 * float(logs.grad.abs().max()))


def test_threads_do_not_show_in_the_slope():
    weight, _ = layer(1, rows=13)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(expected.felt(weight, torch.ones(64), 16, torch.ones(13)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_scales_lower_the_mean_error_over_many_roundings():
    draw, (weight, moment) = torch.Generator().manual_seed(11), layer(11, rows=8)
    scales = expected.expected_scales([weight], moment, 16, 20, [torch.ones(8)])

    def mean_error(scales: torch.Tensor) -> float:
        found = []
        for _ in range(40):
            moved = weight + 0.05 * torch.randn(weight.shape, generator=draw)
            rounded = torch.from_numpy(rtn.quantize(moved * scales, 4, 16, False).dequantize()) / scales
            found.append(output_error(moved, rounded, moment))
        return float(np.mean(found))

    assert mean_error(scales) < 0.9 * mean_error(torch.ones(64))


def test_outputs_that_matter_more_have_more_say_in_the_scales():
    """Two outputs that want opposite scales: the one whose gradient is larger gets them."""
    weight = torch.ones(2, 64)
    weight[0, ::16], weight[1, 1::16] = 8.0, 8.0
    for first, second in ((1.0, 100.0), (100.0, 1.0)):
        scales = expected.expected_scales([weight], torch.eye(64), 16, 20, [torch.tensor([first, second])])
        assert (scales[0] < scales[1]) == (first > second)
