"""Curvature rounding against plain references: no move helps, and nothing gets worse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantline.methods.integer import curvature, curvature_descent, gptq
from quantline.methods.integer.curvature import (
    add_damping,
    divergence,
    refine,
    refit_scales,
)
from quantline.methods.integer.curvature_descent import descend
from quantline.methods.integer.grid import Grid
from quantline.methods.integer.output_error import dequantize_like
from quantline.methods.integer.round_to_nearest import round_to_nearest
from tests.helpers.layers import correlated_moments


def layer(seed: int, rows: int = 12, width: int = 32, blocks: int = 1):
    """Return W [rows, width], H [width, width] and G [blocks, rows / blocks, rows / blocks]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    hessian = correlated_moments(width, generator)
    size = rows // blocks
    fisher_out = torch.stack([correlated_moments(size, generator) for _ in range(blocks)])
    return weight, hessian, fisher_out


def full(fisher_out: torch.Tensor) -> torch.Tensor:
    """Return G [out, out]."""
    return torch.block_diag(*fisher_out)


@pytest.mark.parametrize("blocks", [1, 3])
def test_divergence_is_the_trace(blocks):
    weight, hessian, fisher_out = layer(0, blocks=blocks)
    trace = torch.trace(full(fisher_out) @ weight @ hessian @ weight.T)
    assert divergence(weight, hessian, fisher_out) == pytest.approx(float(trace), rel=1e-4)


@given(st.integers(0, 10_000), st.sampled_from([1, 2]))
def test_descend_ends_where_no_single_move_helps(seed, blocks):
    weight, hessian, fisher_out = layer(seed, 4, 6, blocks)
    linear = round_to_nearest(weight, Grid(3, 6, False))
    zeros = torch.from_numpy(linear.zeros).float().repeat_interleave(6, 1)
    scales = torch.from_numpy(linear.scales).repeat_interleave(6, 1)
    steps = torch.from_numpy(linear.integers).float() - zeros
    product = (steps * scales - weight) @ hessian
    for _ in range(30):
        steps = descend(steps, -zeros, 7 - zeros, scales, product, hessian, fisher_out)
    tolerance = 1e-4 * float(hessian.abs().max())
    assert torch.allclose(product, (steps * scales - weight) @ hessian, atol=tolerance)
    assert ((steps >= -zeros) & (steps <= 7 - zeros)).all()
    least = divergence(steps * scales - weight, hessian, fisher_out)
    for row in range(4):
        for column in range(6):
            for move in (-1, 1):
                moved = steps.clone()
                moved[row, column] += move
                if 0 <= moved[row, column] + zeros[row, column] <= 7:
                    after = divergence(moved * scales - weight, hessian, fisher_out)
                    assert after >= least * (1 - 1e-4)


def test_descend_counts_moves_across_the_blocks_of_columns(monkeypatch):
    weight, hessian, fisher_out = layer(3)
    linear = round_to_nearest(weight, Grid(3, 32, False))
    zeros = torch.from_numpy(linear.zeros).float().repeat_interleave(32, 1)
    scales = torch.from_numpy(linear.scales).repeat_interleave(32, 1)
    start = torch.from_numpy(linear.integers).float() - zeros

    def descended() -> torch.Tensor:
        product = (start * scales - weight) @ hessian
        return descend(start, -zeros, 7 - zeros, scales, product, hessian, fisher_out)

    at_once = descended()
    monkeypatch.setattr(curvature_descent, "BLOCK_COLUMNS", 5)
    assert (descended() == at_once).float().mean() > 0.99


def refitted(solver_steps: int, monkeypatch):
    """Return a layer's scales, what they are refitted to, and its cost as a function of scales."""
    monkeypatch.setattr(curvature, "SOLVER_STEPS", solver_steps)
    weight, hessian, fisher_out = layer(4, blocks=2)
    linear = round_to_nearest(weight, Grid(4, 16, False))
    scales = torch.from_numpy(linear.scales)
    zeros = torch.from_numpy(linear.zeros).float()
    steps = torch.from_numpy(linear.integers).float() - zeros.repeat_interleave(16, 1)
    product = torch.from_numpy(linear.dequantize() - weight.numpy()) @ hessian
    new = refit_scales(steps, scales, product, hessian, fisher_out, 16)
    expected = (steps * new.repeat_interleave(16, 1) - weight) @ hessian
    assert torch.allclose(product, expected, atol=1e-4 * float(hessian.abs().max()))
    assert torch.equal(new, new.bfloat16().float()) and (new > 0).all()

    def cost(scales: torch.Tensor) -> torch.Tensor:
        difference = steps.double() * scales.double().repeat_interleave(16, 1) - weight.double()
        product = difference @ hessian.double() @ difference.T
        return torch.trace(full(fisher_out).double() @ product)

    return scales, new, cost


def test_refit_scales_to_the_end_is_stationary(monkeypatch):
    scales, refit, cost = refitted(100, monkeypatch)
    start = scales.double()
    hessian = torch.autograd.functional.hessian(cost, start).reshape(start.numel(), -1)
    slope = torch.autograd.functional.jacobian(cost, start).reshape(-1)
    least = start - torch.linalg.solve(hessian, slope).reshape(start.shape)
    assert torch.allclose(refit.double(), least, rtol=2**-7)


def test_refit_scales_of_few_steps_gains_most_of_what_there_is(monkeypatch):
    start, few, cost = refitted(curvature.SOLVER_STEPS, monkeypatch)
    _, end, _ = refitted(100, monkeypatch)
    assert cost(start) - cost(few) > 0.7 * (cost(start) - cost(end)) > 0


@given(
    st.integers(0, 10_000),
    st.sampled_from([Grid(2, 8, False), Grid(3, 16, True), Grid(4, 32, False)]),
    st.sampled_from([1, 3]),
)
def test_refine_never_makes_worse_what_came_in(seed, grid, blocks):
    weight, hessian, fisher_out = layer(seed, blocks=blocks)
    linear = gptq.quantize(weight, hessian, grid, gptq.factorize(hessian))
    refined = refine(linear, weight, hessian, fisher_out, rounds=2)
    damped_hessian = add_damping(hessian, curvature.DAMPING_IN)
    damped_fisher = add_damping(fisher_out, curvature.DAMPING_OUT)
    before = divergence(dequantize_like(linear, weight) - weight, damped_hessian, damped_fisher)
    after = divergence(dequantize_like(refined, weight) - weight, damped_hessian, damped_fisher)
    assert after <= before * (1 + 1e-6)
    assert np.array_equal(refined.zeros, linear.zeros)
    assert refined.integers.max() < 2**grid.bits


def test_refine_helps_where_outputs_matter_together():
    weight, hessian, fisher_out = layer(5, 96, 128)
    linear = gptq.quantize(weight, hessian, Grid(3, 32, False), gptq.factorize(hessian))
    refined = refine(linear, weight, hessian, fisher_out)
    before = divergence(dequantize_like(linear, weight) - weight, hessian, fisher_out)
    after = divergence(dequantize_like(refined, weight) - weight, hessian, fisher_out)
    assert after < 0.6 * before


def test_refine_gives_the_same_for_any_number_of_threads():
    weight, hessian, fisher_out = layer(6, 24, 32, 4)
    linear = round_to_nearest(weight, Grid(3, 32, False))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 4):
            torch.set_num_threads(number)
            results.append(refine(linear, weight, hessian, fisher_out))
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(results[0].integers, results[1].integers)


def test_refine_takes_a_group_of_zeros_and_an_input_that_is_never_seen():
    weight, hessian, fisher_out = layer(7)
    weight[:, :8] = 0
    hessian[20] = hessian[:, 20] = 0
    linear = round_to_nearest(weight, Grid(4, 8, False))
    refined = refine(linear, weight, hessian, fisher_out)
    assert np.isfinite(refined.dequantize()).all() and (refined.scales > 0).all()


def test_refine_returns_what_came_in_where_its_moves_make_it_worse(monkeypatch):
    weight, hessian, fisher_out = layer(8)
    linear = round_to_nearest(weight, Grid(4, 16, False))
    monkeypatch.setattr(curvature, "descend", lambda steps, low, *others: low)
    assert refine(linear, weight, hessian, fisher_out) is linear
