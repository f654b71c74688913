"""GPTQ against optimal brain quantization written out, and the laws that it has to keep."""

import numpy as np
import pytest
import torch

from quantline.errors import Failure, StageError
from quantline.methods.integer import gptq
from quantline.methods.integer.clip_search import fit_grids
from quantline.methods.integer.coordinate_descent import refine_rows
from quantline.methods.integer.grid import Grid, nearest_integers, split_groups
from quantline.methods.integer.inverse_factor import inverse_factor
from quantline.methods.integer.round_to_nearest import round_to_nearest
from tests.helpers.layers import error_of, errors_of, uneven_layer


def optimal_brain_quantization(weight, hessian, linear, order, damping):
    """Return integers on a layer's grids, each column's inverse made anew.

    The order of the columns is fixed (Frantar et al. 2022, equation 2).
    """
    scales = torch.from_numpy(linear.scales).double()
    zeros = torch.from_numpy(linear.zeros).double()
    weight = weight.double().clone()
    hessian = hessian.double()
    identity = torch.eye(len(hessian), dtype=torch.float64)
    hessian = hessian + damping * hessian.diagonal().mean() * identity
    left = list(order)
    integers = torch.zeros_like(weight)
    while left:
        column = left[0]
        inverse = torch.linalg.inv(hessian[left][:, left])
        scale = scales[:, column // linear.group_size]
        zero = zeros[:, column // linear.group_size]
        rounded = (weight[:, column] / scale).round() + zero
        integers[:, column] = rounded.clamp(0, 2**linear.bits - 1)
        error = weight[:, column] - (integers[:, column] - zero) * scale
        weight[:, left] -= (error / inverse[0, 0])[:, None] * inverse[0]
        left = left[1:]
    return integers


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("grid", [Grid(4, 16, True), Grid(3, 32, False), Grid(2, 64, False)])
def test_gptq_quantize_is_optimal_brain_quantization_column_by_column(grid, act_order):
    weight, hessian = uneven_layer(1)
    factor = gptq.factorize(hessian, act_order, 0.01)
    linear = gptq.quantize(weight, hessian, grid, factor)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    else:
        order = torch.arange(len(hessian))
    expected = optimal_brain_quantization(weight, hessian, linear, order.tolist(), factor.damping)
    assert factor.damping == 0.01
    # Values half-way between two points may go either way in float32; they are few.
    equal = torch.from_numpy(linear.integers).double() == expected
    assert equal.double().mean() > 0.99


@pytest.mark.parametrize("width", [64, 192])  # less and more than a block of columns
def test_gptq_quantize_has_less_output_error_than_round_to_nearest(width):
    weight, hessian = uneven_layer(2, width=width)
    grid = Grid(3, 16, False)
    linear = gptq.quantize(weight, hessian, grid, gptq.factorize(hessian))
    plain = round_to_nearest(weight, grid)
    assert error_of(linear, weight, hessian) < 0.6 * error_of(plain, weight, hessian)


@pytest.mark.parametrize(("grid", "share"), [(Grid(3, 16, False), 0.99), (Grid(4, 64, True), 1)])
def test_gptq_improve_lowers_the_error_of_every_row_and_once_more_helps(grid, share):
    weight, hessian = uneven_layer(3, rows=32, width=192)
    factor = gptq.factorize(hessian)
    linear = gptq.quantize(weight, hessian, grid, factor)
    refined, _ = refine_rows(linear, weight, hessian)
    improved = gptq.improve(linear, weight, hessian, factor)
    before = errors_of(linear, weight, hessian)
    after_descent = errors_of(refined, weight, hessian)
    after = errors_of(improved, weight, hessian)
    assert (after <= after_descent).all() and (after_descent <= before).all()
    assert after.sum() < share * after_descent.sum()


def test_gptq_counts_the_errors_of_rows_while_it_rounds_and_keeps_the_better():
    weight, hessian = uneven_layer(7, rows=24, width=192)
    grid = Grid(3, 64, False)
    factor = gptq.factorize(hessian)
    added = factor.damping * hessian.diagonal().mean() * torch.eye(192)
    grids = [fit_grids(weight, grid), fit_grids(weight, grid, hessian.diagonal())]
    rounded = gptq.round_on_grids(weight, grids, grid, factor)
    counted = torch.stack([errors for _, errors in rounded])
    expected = [errors_of(linear, weight, hessian + added) for linear, _ in rounded]
    assert torch.allclose(counted, torch.stack(expected), rtol=1e-4)
    assert 0 < (counted[1] < counted[0]).sum() < len(weight)
    chosen = gptq.quantize(weight, hessian, grid, factor)
    least = torch.stack(expected).amin(0)
    assert torch.allclose(errors_of(chosen, weight, hessian + added), least, rtol=1e-4)


def test_gptq_quantize_without_correlation_rounds_to_nearest_on_the_same_grids():
    weight, hessian = uneven_layer(4)
    diagonal = torch.diag(hessian.diagonal())
    grid = Grid(4, 16, True)
    linear = gptq.quantize(weight, diagonal, grid, gptq.factorize(diagonal))
    scales, zeros = fit_grids(weight, grid, diagonal.diagonal())
    groups = split_groups(weight, grid)
    nearest = nearest_integers(groups, scales[..., None], zeros[..., None], grid)
    assert np.array_equal(linear.integers, nearest.reshape(weight.shape).numpy())


def test_gptq_factorize_raises_the_damping_until_the_moments_can_be_inverted():
    _, hessian = uneven_layer(5)
    direction = torch.randn(64, generator=torch.Generator().manual_seed(0))
    outer = torch.outer(direction, direction) / direction.norm() ** 2
    broken = hessian - 0.05 * hessian.diagonal().mean() * outer
    assert torch.linalg.eigvalsh(broken).min() < 0
    assert gptq.factorize(broken, damping=0.001).damping == pytest.approx(0.1)


def test_gptq_factorize_refuses_moments_that_no_damping_mends():
    _, hessian = uneven_layer(6)
    negative = hessian - 50 * hessian.diagonal().mean() * torch.eye(64)
    words = r"of at most 1, found none \(tried 0\.01, 0\.1, 1\); calibrate on more text"
    with pytest.raises(StageError, match=words) as caught:
        gptq.factorize(negative)
    assert caught.value.failure == Failure.HESSIAN_NOT_POSITIVE_DEFINITE


def test_gptq_round_columns_does_what_a_plain_loop_does():
    weight, hessian = uneven_layer(13)
    scales, zeros = fit_grids(weight, Grid(4, 64, False))
    upper, _ = inverse_factor(hessian, 0.01)
    integers, errors = gptq.round_columns(
        weight, scales.expand(-1, 64), zeros.expand(-1, 64), upper, 15
    )
    left = weight.clone()
    for j in range(64):
        expected = ((left[:, j] / scales[:, 0]).round() + zeros[:, 0]).clamp(0, 15)
        error = (left[:, j] - (expected - zeros[:, 0]) * scales[:, 0]) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
        assert (integers[:, j] == expected).float().mean() > 0.99
        assert torch.allclose(errors[:, j], error, atol=1e-3)
