"""The integer methods against plain references and the laws that they have to keep."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantline.methods.integer import awq, awq_clip as spans, fp8, gptq, int8, rtn, smoothquant
from quantline.methods.integer.grid import (
    check_finite,
    check_width,
    grid_between,
    grid_of,
    least_spans_at_once,
    output_error,
    round_to,
    row_errors,
    span_of,
)
from quantline.methods.integer.coordinate_descent import polish
from quantline.errors import Failure, StageError

GRIDS = [(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (16, 64) for symmetric in (True, False)]


def layer(seed: int, rows: int = 24, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, width] and the second moments [width, width] of correlated inputs of unlike size."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=draw) * torch.logspace(-1.5, 0.5, width)[:, None]
    inputs = torch.randn(512, width, generator=draw) @ mixing.T
    return torch.randn(rows, width, generator=draw), inputs.T @ inputs / len(inputs)


def error(weight: torch.Tensor, linear, moment: torch.Tensor) -> float:
    return output_error(weight, torch.from_numpy(linear.dequantize()), moment)


@given(st.integers(0, 2**32 - 1), st.sampled_from(GRIDS))
def test_round_to_nearest_is_nearest_and_stays_on_the_grid(seed, grid):
    bits, group, symmetric = grid
    weight, _ = layer(seed % 1000, rows=3)
    linear = rtn.quantize(weight, bits, group, symmetric)
    scale = np.repeat(linear.scales, group, 1)
    zero = np.repeat(linear.zeros, group, 1).astype(np.float32)
    points = (np.arange(2**bits)[:, None, None] - zero) * scale
    nearest = np.abs(points - weight.numpy()).min(0)
    assert np.allclose(np.abs(linear.dequantize() - weight.numpy()), nearest, atol=1e-6)
    assert torch.equal(torch.from_numpy(linear.scales), torch.from_numpy(linear.scales).bfloat16().float())
    assert (linear.zeros == 2 ** (bits - 1)).all() or not symmetric


@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
def test_zero_is_always_a_point_of_the_grid(bits, group, symmetric):
    weight = layer(0)[0].abs() + 1  # no zero and no negative weight
    weight[:, ::7] = 0
    assert (rtn.quantize(weight, bits, group, symmetric).dequantize()[:, ::7] == 0).all()


def test_a_group_of_zeros_stays_zero():
    assert not rtn.quantize(torch.zeros(2, 32), 4, 32, True).dequantize().any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_weighted_span_is_never_worse_than_the_whole_span(bits):
    weight, moment = layer(3)
    importance = moment.diagonal()

    def weighted(scale, zero):
        grouped = weight.reshape(len(weight), -1, 16)
        rounded = (round_to(grouped, scale[..., None], zero[..., None], bits) - zero[..., None]) * scale[..., None]
        return (((rounded - grouped) ** 2) * importance.reshape(1, -1, 16)).sum(-1)

    plain, chosen = weighted(*grid_of(weight, bits, 16, False)), weighted(*grid_of(weight, bits, 16, False, importance))
    assert (chosen <= plain * (1 + 1e-6)).all()
    assert bits == 8 or (chosen < plain).any()


def test_spans_by_the_compiled_kernel_and_all_at_once(monkeypatch):
    weight, moment = layer(15, rows=64)
    one = grid_of(weight, 3, 16, False, moment.diagonal())
    monkeypatch.setattr("quantline.methods.integer.grid.least_spans", least_spans_at_once)
    other = grid_of(weight, 3, 16, False, moment.diagonal())
    assert all((first == second).float().mean() > 0.99 for first, second in zip(one, other, strict=True))


def plain_gptq(weight, moment, scales, zeros, bits, group, order, damping):
    """Optimal brain quantization with the order fixed, each column's inverse made anew (Frantar et al. 2022, eq. 2)."""
    weight, top = weight.double().clone(), 2**bits - 1
    moment = moment.double() + damping * moment.double().diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    left, integers = list(order), torch.zeros_like(weight)
    while left:
        column = left[0]
        inverse = torch.linalg.inv(moment[left][:, left])
        scale, zero = scales[:, column // group].double(), zeros[:, column // group].double()
        integers[:, column] = ((weight[:, column] / scale).round() + zero).clamp(0, top)
        gone = (weight[:, column] - (integers[:, column] - zero) * scale) / inverse[0, 0]
        weight[:, left] -= gone[:, None] * inverse[0]
        left = left[1:]
    return integers


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 16, True), (3, 32, False), (2, 64, False)])
def test_gptq_is_optimal_brain_quantization_column_by_column(bits, group, symmetric, act_order):
    weight, moment = layer(1)
    solved = gptq.solve(moment, act_order, 0.01)
    linear = gptq.quantize(weight, moment, bits, group, symmetric, solved)
    order = torch.argsort(moment.diagonal(), descending=True, stable=True) if act_order else torch.arange(len(moment))
    expected = plain_gptq(weight, moment, torch.from_numpy(linear.scales), torch.from_numpy(linear.zeros), bits, group,
                          order.tolist(), solved.damping)
    assert solved.damping == 0.01
    # Values half-way between two points may go either way in float32; they are few.
    assert (torch.from_numpy(linear.integers).double() == expected).double().mean() > 0.99


@pytest.mark.parametrize("width", [64, 192])  # less and more than a block of the solve
def test_gptq_has_less_output_error_than_round_to_nearest(width):
    weight, moment = layer(2, width=width)
    linear = gptq.quantize(weight, moment, 3, 16, False, gptq.solve(moment))
    assert error(weight, linear, moment) < 0.6 * error(weight, rtn.quantize(weight, 3, 16, False), moment)


@pytest.mark.parametrize(("grid", "share"), [((3, 16, False), 0.99), ((4, 64, True), 1)])
def test_gptq_settles_on_less_error_in_every_row_and_once_more_helps(grid, share):
    weight, moment = layer(3, rows=32, width=192)
    solved = gptq.solve(moment)
    linear = gptq.quantize(weight, moment, *grid, solved)
    found = [row_errors(weight, torch.from_numpy(one.dequantize()), moment)
             for one in (linear, polish(linear, weight, moment)[0], gptq.improve(linear, weight, moment, solved))]
    assert (found[2] <= found[1]).all() and (found[1] <= found[0]).all()
    assert found[2].sum() < share * found[1].sum()


def test_gptq_without_correlation_is_rounding_on_the_same_grid():
    weight, moment = layer(4)
    diagonal = torch.diag(moment.diagonal())
    linear = gptq.quantize(weight, diagonal, 4, 16, True, gptq.solve(diagonal))
    scales, zeros = grid_of(weight, 4, 16, True, diagonal.diagonal())
    nearest = round_to(weight.reshape(len(weight), -1, 16), scales[..., None], zeros[..., None], 4)
    assert np.array_equal(linear.integers, nearest.reshape(weight.shape).numpy())


def test_damping_grows_until_the_moments_can_be_inverted_and_is_told():
    _, moment = layer(5)
    direction = torch.randn(64, generator=torch.Generator().manual_seed(0))
    broken = moment - 0.05 * moment.diagonal().mean() * torch.outer(direction, direction) / direction.norm() ** 2
    assert torch.linalg.eigvalsh(broken).min() < 0
    assert gptq.solve(broken, damping=0.001).damping == pytest.approx(0.1)


def test_moments_that_no_damping_mends_are_refused():
    _, moment = layer(6)
    with pytest.raises(StageError, match="up to a damping of 1.0; calibrate on more text") as caught:
        gptq.solve(moment - 50 * moment.diagonal().mean() * torch.eye(64))
    assert caught.value.failure == Failure.HESSIAN_NOT_POSITIVE_DEFINITE


def test_awq_scales_up_what_matters_and_has_less_error_than_rounding():
    weight, moment = layer(7, rows=48)
    scales, reach = awq.search_scales([weight[:24], weight[24:]], moment, 3, 16, False, 20)
    assert reach > 0
    assert np.corrcoef(scales.log(), moment.diagonal().log())[0, 1] > 0.9
    linear = spans.quantize(weight * scales, awq.scaled_moment(moment, scales), 3, 16, False)
    scaled_back = torch.from_numpy(linear.dequantize()) / scales
    assert output_error(weight, scaled_back, moment) < 0.9 * error(weight, rtn.quantize(weight, 3, 16, False), moment)


def test_awq_finds_no_scales_where_all_inputs_and_weights_are_alike():
    signs = torch.where(torch.rand(24, 64, generator=torch.Generator().manual_seed(8)) < 0.5, -1.0, 1.0)
    scales, reach = awq.search_scales([signs], torch.eye(64), 4, 16, False, 20)
    assert reach == 0 and torch.equal(scales, torch.ones(64))


def test_the_moment_of_a_scaled_input():
    draw = torch.Generator().manual_seed(0)
    inputs, scales = torch.randn(100, 8, generator=draw), torch.rand(8, generator=draw) + 0.5
    moment, scaled = inputs.T @ inputs, inputs / scales
    assert torch.allclose(awq.scaled_moment(moment, scales), scaled.T @ scaled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True), (4, False), (8, False)])
def test_a_row_is_clipped_only_where_it_gains(bits, symmetric):
    weight, moment = layer(9)
    plain, linear = rtn.quantize(weight, bits, 16, symmetric), spans.quantize(weight, moment, bits, 16, symmetric)
    before, after = (row_errors(weight, torch.from_numpy(one.dequantize()), moment) for one in (plain, linear))
    assert (after <= before).all() and after.sum() < (0.9 if bits < 8 else 1.0) * before.sum()


@given(st.integers(0, 10_000), st.sampled_from([(2, False), (3, True), (4, False)]))
def test_a_span_of_the_only_group_is_the_best_of_all(seed, grid):
    """With one group and inputs that are not correlated every pair of shares can be tried out."""
    weight, moment = layer(seed, rows=3, width=16)
    moment = torch.diag(moment.diagonal())
    low, high = span_of(weight[:, None])
    tried = [[one, other] for one in spans.SHARES for other in spans.SHARES if one == other or not grid[1]]
    errors = []
    for shares in tried:
        scale, zero = grid_between(low * shares[0], high * shares[1], *grid)
        rounded = (round_to(weight[:, None], scale, zero, grid[0]) - zero) * scale
        errors.append(row_errors(weight, rounded[:, 0], moment))
    found = row_errors(weight, torch.from_numpy(spans.quantize(weight, moment, grid[0], 16, grid[1]).dequantize()), moment)
    assert torch.allclose(found, torch.stack(errors).amin(0), rtol=1e-4)


def test_groups_that_feel_each_other_are_clipped_together():
    """One that only looks at itself is left behind: each group alone has the best span, all of them together not."""
    weight, moment = layer(14, rows=64)
    alone = moment * torch.block_diag(*torch.ones(4, 16, 16))
    together, apart = (error(weight, spans.quantize(weight, one, 3, 16, False), moment) for one in (moment, alone))
    assert together < 0.95 * apart


def test_the_kernel_of_gptq_does_what_a_plain_loop_does():
    weight, moment = layer(13)
    scales, zeros = grid_of(weight, 4, 64, False)
    upper, _ = gptq.inverse_factor(moment, 0.01)
    integers, errors = gptq.round_columns(weight, scales.expand(-1, 64), zeros.expand(-1, 64), upper, 15)
    left = weight.clone()
    for j in range(64):
        wanted = ((left[:, j] / scales[:, 0]).round() + zeros[:, 0]).clamp(0, 15)
        error = (left[:, j] - (wanted - zeros[:, 0]) * scales[:, 0]) / upper[j, j]
        left[:, j + 1:] -= error[:, None] * upper[j, j + 1:]
        assert (integers[:, j] == wanted).float().mean() > 0.99 and torch.allclose(errors[:, j], error, atol=1e-3)


def test_int8_has_one_symmetric_scale_per_output():
    weight, _ = layer(10)
    linear = int8.quantize(weight)
    assert linear.scales.shape == (24, 1) and (linear.zeros == 128).all()
    assert np.abs(linear.dequantize() - weight.numpy()).max() <= linear.scales.max() * 0.5001


def test_fp8_is_off_by_half_a_step_of_its_mantissa_at_most():
    weight, _ = layer(10)
    weight[3] *= 1e-3
    linear = fp8.quantize(weight)
    stored, largest = torch.from_numpy(linear.dequantize()), weight.abs().amax(1, keepdim=True)
    smallest = largest / 448 * 2**-9  # the format's finest step, which small weights have
    assert ((stored - weight).abs() <= torch.maximum(weight.abs() * 2**-4, smallest) * 1.01).all()
    assert linear.values.dtype == ml_dtypes.float8_e4m3fn and linear.scales.shape == (24, 1)


def test_no_weight_leaves_the_range_of_fp8():
    """Scales that bfloat16 rounds down put the largest weight beyond 448, which the format would make NaN."""
    weight = torch.linspace(1, 2, 300)[:, None] * torch.tensor([[1.0, -0.5]])
    found = fp8.quantize(weight).dequantize()
    assert np.isfinite(found).all() and np.abs(found - weight.numpy()).max() < 0.1


def loud_inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [24, 64] and inputs [200, 64] with two channels a hundred times as large as the others."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(200, 64, generator=draw)
    rows[:, [5, 40]] *= 100
    return torch.randn(24, 64, generator=draw), rows


def test_smoothing_changes_outputs_less_where_some_inputs_are_loud():
    weight, rows = loud_inputs(0)
    scales, exponent = smoothquant.search_scales([weight], rows.abs().amax(0), rows, 20, None)
    assert exponent is not None and scales[5] > 5 * scales[6]

    def change(scales: torch.Tensor) -> float:
        """What a server makes of it, written out: each token and each output with a step of its own."""
        inputs, rounded = rows / scales, weight * scales
        step, width = inputs.abs().amax(1, keepdim=True) / 127.5, rounded.abs().amax(1, keepdim=True) / 127
        outputs = ((inputs / step).round() * step) @ ((rounded / width).round() * width).T
        return float(((outputs - rows @ weight.T) ** 2).sum(1).mean())

    assert change(scales) < 0.2 * change(torch.ones(64))
    stored = torch.from_numpy(int8.quantize(weight * scales).dequantize())
    assert smoothquant.output_change(weight, stored, rows, scales) == pytest.approx(change(scales), rel=0.1)


def test_smoothing_by_the_exponent_that_was_asked():
    weight, rows = loud_inputs(1)
    peak = rows.abs().amax(0)
    scales, exponent = smoothquant.search_scales([weight], peak, rows, 20, 0.5)
    wanted = (peak / weight.abs().amax(0)).sqrt()
    assert exponent == 0.5 and torch.allclose(scales / scales[0], wanted / wanted[0], rtol=1e-4)


def test_no_smoothing_where_all_is_alike():
    weight, rows = (one.sign() for one in loud_inputs(2))
    scales, exponent = smoothquant.search_scales([weight], rows.abs().amax(0), rows, 20, None)
    assert exponent is None and torch.equal(scales, torch.ones(64))


def test_output_error_is_the_squared_error_of_the_outputs():
    draw = torch.Generator().manual_seed(1)
    inputs, weight = torch.randn(200, 16, generator=draw), torch.randn(5, 16, generator=draw)
    other = weight + 0.1 * torch.randn(5, 16, generator=draw)
    plain = ((inputs @ (other - weight).T) ** 2).mean(0).sum()
    assert output_error(weight, other, inputs.T @ inputs / 200) == pytest.approx(float(plain), rel=1e-5)


def test_groups_that_do_not_divide_the_row_are_refused_with_those_that_do():
    assert check_width("x", 256, 64) == 64 and check_width("x", 100, -1) == 100
    with pytest.raises(StageError, match="group_size can be 32 here") as caught:
        check_width("model.layers.0.mlp.down_proj", 352, 128)
    assert caught.value.failure == Failure.UNSUPPORTED_WIDTH and "down_proj has rows of 352" in str(caught.value)
    with pytest.raises(StageError, match="the whole row"):
        check_width("x", 100, 128)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    with pytest.raises(StageError, match="the weight of q_proj is not finite") as caught:
        check_finite("q_proj", torch.tensor([1.0, value]))
    assert caught.value.failure == Failure.NON_FINITE


def test_no_layer_pays_for_another_that_reads_the_same_input():
    first, moment = layer(11)
    second = 30 * torch.randn(24, 64, generator=torch.Generator().manual_seed(3)) / moment.diagonal().sqrt()
    scales, _ = awq.search_scales([first, second], moment, 3, 16, False, 20)
    for weight in (first, second):
        rounded = torch.from_numpy(rtn.quantize(weight * scales, 3, 16, False).dequantize()) / scales
        assert output_error(weight, rounded, moment) <= error(weight, rtn.quantize(weight, 3, 16, False), moment)


def test_divisors_under_which_a_layer_would_be_worse_are_refused(monkeypatch):
    weight, _ = layer(12, rows=2)
    monkeypatch.setattr(awq, "expected_scales", lambda *args: torch.ones(64))
    found = [awq.search_scales([weight], torch.eye(64), 4, 16, False, 2, [torch.tensor([1.0, divisor])])
             for divisor in torch.linspace(1, 2, 40).tolist()]
    assert found[0] is not None and None in found  # scales in bfloat16 make some divisors worse by a little
