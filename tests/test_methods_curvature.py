"""Curvature rounding against plain references: no single move helps any more, and nothing that came in is made worse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantline.methods.integer import curvature, gptq, rtn
from quantline.methods.integer.curvature import damped, descend, divergence, refine, refit_scales


def layer(seed: int, rows: int = 12, width: int = 32, blocks: int = 1):
    """weight [rows, width], H [width, width] and G [blocks, rows / blocks, …], positive definite and correlated."""
    draw = torch.Generator().manual_seed(seed)

    def factor(size: int) -> torch.Tensor:
        mixed = torch.randn(4 * size, size, generator=draw) @ torch.randn(size, size, generator=draw)
        return mixed.T @ mixed / (4 * size)

    return torch.randn(rows, width, generator=draw), factor(width), torch.stack([factor(rows // blocks) for _ in range(blocks)])


def whole(factors: torch.Tensor) -> torch.Tensor:
    return torch.block_diag(*factors)


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_divergence_is_the_trace(blocks):
    weight, moment, factors = layer(0, blocks=blocks)
    assert divergence(weight, moment, factors) == pytest.approx(
        float(torch.trace(whole(factors) @ weight @ moment @ weight.T)), rel=1e-4)


@given(st.integers(0, 10_000), st.sampled_from([1, 2]))
def test_after_the_descent_no_single_move_helps(seed, blocks):
    weight, moment, factors = layer(seed, 4, 6, blocks)
    linear = rtn.quantize(weight, 3, 6, False)
    zeros = torch.from_numpy(linear.zeros).float().repeat_interleave(6, 1)
    scales = torch.from_numpy(linear.scales).repeat_interleave(6, 1)
    steps = torch.from_numpy(linear.integers).float() - zeros
    product = (steps * scales - weight) @ moment
    for _ in range(30):
        steps = descend(steps, -zeros, 7 - zeros, scales, product, moment, factors)
    assert torch.allclose(product, (steps * scales - weight) @ moment, atol=1e-4 * float(moment.abs().max()))
    assert ((steps >= -zeros) & (steps <= 7 - zeros)).all()
    least = divergence(steps * scales - weight, moment, factors)
    for row in range(4):
        for column in range(6):
            for move in (-1, 1):
                other = steps.clone()
                other[row, column] += move
                if 0 <= other[row, column] + zeros[row, column] <= 7:
                    assert divergence(other * scales - weight, moment, factors) >= least * (1 - 1e-4)


def test_columns_felt_through_h_across_the_blocks_of_the_kernel(monkeypatch):
    weight, moment, factors = layer(3)
    linear = rtn.quantize(weight, 3, 32, False)
    zeros = torch.from_numpy(linear.zeros).float().repeat_interleave(32, 1)
    scales = torch.from_numpy(linear.scales).repeat_interleave(32, 1)
    start = torch.from_numpy(linear.integers).float() - zeros

    def descended() -> torch.Tensor:
        return descend(start, -zeros, 7 - zeros, scales, (start * scales - weight) @ moment, moment, factors)

    one = descended()
    monkeypatch.setattr(curvature, "COLUMNS", 5)
    assert (descended() == one).float().mean() > 0.99


def refitted(steps_of_cg: int, monkeypatch):
    """(what a layer's scales were, what they are refitted to, its cost as a function of scales)."""
    monkeypatch.setattr(curvature, "STEPS", steps_of_cg)
    weight, moment, factors = layer(4, blocks=2)
    linear = rtn.quantize(weight, 4, 16, False)
    scales, zeros = (torch.from_numpy(one).float() for one in (linear.scales, linear.zeros))
    steps = torch.from_numpy(linear.integers).float() - zeros.repeat_interleave(16, 1)
    product = torch.from_numpy(linear.dequantize() - weight.numpy()) @ moment
    found = refit_scales(steps, scales, product, moment, factors, 16)
    assert torch.allclose(product, (steps * found.repeat_interleave(16, 1) - weight) @ moment, atol=1e-4 * float(moment.abs().max()))
    assert torch.equal(found, found.bfloat16().float()) and (found > 0).all()

    def cost(scales: torch.Tensor) -> torch.Tensor:
        left = steps.double() * scales.double().repeat_interleave(16, 1) - weight.double()
        return torch.trace(whole(factors).double() @ left @ moment.double() @ left.T)

    return scales, found, cost


def test_scales_refitted_to_the_end_are_stationary(monkeypatch):
    start, found, cost = refitted(100, monkeypatch)
    hessian = torch.autograd.functional.hessian(cost, start.double()).reshape(start.numel(), -1)
    slope = torch.autograd.functional.jacobian(cost, start.double()).reshape(-1)
    least = start.double() - torch.linalg.solve(hessian, slope).reshape(start.shape)
    assert torch.allclose(found.double(), least, rtol=2**-7)


def test_a_refit_of_few_steps_gains_most_of_what_there_is(monkeypatch):
    (start, few, cost), (_, end, _) = refitted(curvature.STEPS, monkeypatch), refitted(100, monkeypatch)
    assert cost(start) - cost(few) > 0.7 * (cost(start) - cost(end)) > 0


@given(st.integers(0, 10_000), st.sampled_from([(2, 8, False), (3, 16, True), (4, 32, False)]), st.sampled_from([1, 3]))
def test_what_came_in_is_never_made_worse(seed, grid, blocks):
    weight, moment, factors = layer(seed, blocks=blocks)
    linear = gptq.quantize(weight, moment, *grid, gptq.solve(moment))
    found = refine(linear, weight, moment, factors, rounds=2)
    inner, outer = damped(moment, curvature.DAMPING_IN), damped(factors, curvature.DAMPING_OUT)
    before, after = (divergence(torch.from_numpy(one.dequantize()) - weight, inner, outer) for one in (linear, found))
    assert after <= before * (1 + 1e-6)
    assert np.array_equal(found.zeros, linear.zeros) and found.integers.max() < 2 ** grid[0]


def test_curvature_helps_where_the_outputs_are_felt_together():
    weight, moment, factors = layer(5, 48, 64)
    linear = gptq.quantize(weight, moment, 3, 32, False, gptq.solve(moment))
    before, after = (divergence(torch.from_numpy(one.dequantize()) - weight, moment, factors)
                     for one in (linear, refine(linear, weight, moment, factors)))
    assert after < 0.6 * before


def test_threads_do_not_show_in_the_result():
    weight, moment, factors = layer(6, 24, 32, 4)
    linear = rtn.quantize(weight, 3, 32, False)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 4):
            torch.set_num_threads(number)
            results.append(refine(linear, weight, moment, factors))
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(results[0].integers, results[1].integers)


def test_a_group_of_zeros_and_an_input_that_is_never_seen():
    weight, moment, factors = layer(7)
    weight[:, :8] = 0
    moment[20] = moment[:, 20] = 0
    found = refine(rtn.quantize(weight, 4, 8, False), weight, moment, factors)
    assert np.isfinite(found.dequantize()).all() and (found.scales > 0).all()
