"""The integer methods against plain references and the laws that they have to keep."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.methods import awq, gptq, int8, rtn
from stages.methods.grid import check_finite, check_width, grid_of, output_error, round_to
from stages.tracking import Failure, StageError

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
    assert (chosen <= plain).all()
    assert bits == 8 or (chosen < plain).any()


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
    linear, damping = gptq.quantize(weight, moment, bits, group, symmetric, act_order, 0.01)
    order = torch.argsort(moment.diagonal(), descending=True, stable=True) if act_order else torch.arange(len(moment))
    expected = plain_gptq(weight, moment, torch.from_numpy(linear.scales), torch.from_numpy(linear.zeros), bits, group,
                          order.tolist(), damping)
    assert damping == 0.01
    # Values half-way between two points may go either way in float32; they are few.
    assert (torch.from_numpy(linear.integers).double() == expected).double().mean() > 0.99


@pytest.mark.parametrize("width", [64, 192])  # less and more than a block of the solve
def test_gptq_has_less_output_error_than_round_to_nearest(width):
    weight, moment = layer(2, width=width)
    linear, _ = gptq.quantize(weight, moment, 3, 16, False)
    assert error(weight, linear, moment) < 0.6 * error(weight, rtn.quantize(weight, 3, 16, False), moment)


def test_gptq_without_correlation_is_rounding_on_the_same_grid():
    weight, moment = layer(4)
    diagonal = torch.diag(moment.diagonal())
    linear, _ = gptq.quantize(weight, diagonal, 4, 16, True)
    scales, zeros = grid_of(weight, 4, 16, True, diagonal.diagonal())
    nearest = round_to(weight.reshape(len(weight), -1, 16), scales[..., None], zeros[..., None], 4)
    assert np.array_equal(linear.integers, nearest.reshape(weight.shape).numpy())


def test_damping_grows_until_the_moments_can_be_inverted_and_is_told():
    weight, moment = layer(5)
    direction = torch.randn(64, generator=torch.Generator().manual_seed(0))
    broken = moment - 0.05 * moment.diagonal().mean() * torch.outer(direction, direction) / direction.norm() ** 2
    assert torch.linalg.eigvalsh(broken).min() < 0
    _, damping = gptq.quantize(weight, broken, 4, 16, True, damping=0.001)
    assert damping == pytest.approx(0.1)


def test_moments_that_no_damping_mends_are_refused():
    weight, moment = layer(6)
    with pytest.raises(StageError, match="up to a damping of 1.0; calibrate on more text") as caught:
        gptq.quantize(weight, moment - 50 * moment.diagonal().mean() * torch.eye(64), 4, 16, True)
    assert caught.value.failure == Failure.HESSIAN_NOT_POSITIVE_DEFINITE


def test_awq_scales_up_what_matters_and_has_less_error_than_rounding():
    weight, moment = layer(7, rows=48)
    scales, exponent = awq.search_scales([weight[:24], weight[24:]], moment, 3, 16, False, 20)
    assert exponent > 0
    assert scales[moment.diagonal().argmax()] == scales.max() and scales[moment.diagonal().argmin()] == scales.min()
    linear = awq.quantize(weight * scales, awq.scaled_moment(moment, scales), 3, 16, False)
    scaled_back = torch.from_numpy(linear.dequantize()) / scales
    assert output_error(weight, scaled_back, moment) < 0.9 * error(weight, rtn.quantize(weight, 3, 16, False), moment)


def test_awq_finds_no_scales_where_all_inputs_are_alike():
    weight, _ = layer(8)
    scales, exponent = awq.search_scales([weight], torch.eye(64), 4, 16, False, 20)
    assert exponent == 0 and torch.equal(scales, torch.ones(64))


def test_the_moment_of_a_scaled_input():
    draw = torch.Generator().manual_seed(0)
    inputs, scales = torch.randn(100, 8, generator=draw), torch.rand(8, generator=draw) + 0.5
    moment, scaled = inputs.T @ inputs, inputs / scales
    assert torch.allclose(awq.scaled_moment(moment, scales), scaled.T @ scaled, rtol=1e-4, atol=1e-4)


def test_clipping_is_kept_only_where_the_layer_gains():
    weight, moment = layer(9)
    linear = awq.quantize(weight, moment, 3, 16, False)
    assert error(weight, linear, moment) <= error(weight, rtn.quantize(weight, 3, 16, False), moment)


def test_int8_has_one_symmetric_scale_per_output():
    weight, _ = layer(10)
    linear = int8.quantize(weight)
    assert linear.scales.shape == (24, 1) and (linear.zeros == 128).all()
    assert np.abs(linear.dequantize() - weight.numpy()).max() <= linear.scales.max() * 0.5001


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


def test_divisors_under_which_a_layer_would_be_worse_are_refused():
    weight, _ = layer(12, rows=2)
    found = [awq.search_scales([weight], torch.eye(64), 4, 16, False, 2, [torch.tensor([1.0, divisor])])
             for divisor in torch.linspace(1, 2, 40).tolist()]
    assert found[0] is not None and None in found  # scales in bfloat16 make some divisors worse by a little
