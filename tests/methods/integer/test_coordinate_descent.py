"""Descent on each row's error against plain references: no move helps, and no row gets worse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantline.methods.integer.coordinate_descent import refine_rows
from quantline.methods.integer.grid import Grid
from quantline.methods.integer.round_to_nearest import round_to_nearest
from tests.helpers.layers import correlated_moments, errors_of

GRIDS = [Grid(2, 32, False), Grid(3, 64, True), Grid(4, 32, False), Grid(8, 64, False)]


def layer(seed: int, rows: int = 6, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W [rows, width] and H [width, width], correlated."""
    generator = torch.Generator().manual_seed(seed)
    hessian = correlated_moments(width, generator)
    return torch.randn(rows, width, generator=generator), hessian


@given(st.integers(0, 10_000), st.sampled_from(GRIDS))
def test_refine_rows_makes_no_row_worse_and_most_better(seed, grid):
    weight, hessian = layer(seed)
    linear = round_to_nearest(weight, grid)
    refined, returned = refine_rows(linear, weight, hessian)
    before = errors_of(linear, weight, hessian)
    after = errors_of(refined, weight, hessian)
    assert torch.allclose(returned, after, rtol=1e-3)
    assert (after <= before * (1 + 1e-6)).all() and (after < 0.9 * before).any()
    assert np.array_equal(refined.zeros, linear.zeros)
    assert refined.integers.max() < 2**grid.bits
    scales = torch.from_numpy(refined.scales)
    assert torch.equal(scales, scales.bfloat16().float())


@given(st.integers(0, 10_000))
def test_refine_rows_ends_where_no_single_move_and_no_other_scale_helps(seed):
    weight, hessian = layer(seed, 2, 32)
    linear = round_to_nearest(weight, Grid(3, 32, False))
    refined, _ = refine_rows(linear, weight, hessian, rounds=50)
    least = errors_of(refined, weight, hessian)
    for column in range(32):
        for move in (-1, 1):
            integers = refined.integers.astype(np.int16)
            integers[:, column] += move
            inside = torch.from_numpy((integers[:, column] >= 0) & (integers[:, column] < 8))
            moved = replace(refined, integers=integers.clip(0, 7).astype(np.uint8))
            assert (errors_of(moved, weight, hessian) >= least * (1 - 1e-4))[inside].all()
    for share in (1 - 2**-6, 1 + 2**-6):
        rescaled = replace(refined, scales=refined.scales * np.float32(share))
        assert (errors_of(rescaled, weight, hessian) > least).all()


def test_refine_rows_counts_columns_beyond_those_that_are_gathered():
    weight, hessian = layer(4, 4, 256)
    linear = round_to_nearest(weight, Grid(3, 32, False))
    refined, _ = refine_rows(linear, weight, hessian, rounds=30)
    scale = torch.from_numpy(refined.scales).repeat_interleave(32, 1)
    zero = torch.from_numpy(refined.zeros).float().repeat_interleave(32, 1)
    integers = torch.from_numpy(refined.integers).float()
    gradient = ((integers - zero) * scale - weight) @ hessian
    best = integers - gradient / (hessian.diagonal() * scale)
    assert (best.round().clamp(0, 7) == integers).float().mean() > 0.99


def plain_descend_rows(steps, scales, zeros, gradients, products, hessian, max_int):
    """Do what `descend_rows` does, one column after another in torch."""
    steps = steps.clone()
    scales = scales.clone()
    gradients = gradients.clone()
    size = steps.shape[1] // scales.shape[1]
    diagonal = hessian.diagonal()
    for group in range(scales.shape[1]):
        span = slice(group * size, (group + 1) * size)
        curvature = (products[:, group, span] * steps[:, span]).sum(1)
        slope = (steps[:, span] * gradients[:, span]).sum(1)
        new = (scales[:, group] - slope / curvature).bfloat16().float()
        new = torch.where((new > 0) & torch.isfinite(new), new, scales[:, group])
        gradients += (new - scales[:, group])[:, None] * products[:, group]
        scales[:, group] = new
        for j in range(span.start, span.stop):
            nearest = (steps[:, j] - gradients[:, j] / (diagonal[j] * new)).round()
            wanted = torch.where(diagonal[j] > 0, nearest, steps[:, j])
            wanted = torch.maximum(wanted, -zeros[:, group])
            wanted = torch.minimum(wanted, max_int - zeros[:, group])
            gradients += ((wanted - steps[:, j]) * new)[:, None] * hessian[j]
            steps[:, j] = wanted
    return steps, scales


@pytest.mark.parametrize("group_size", [32, 128, 160])
def test_descend_rows_does_what_a_plain_loop_does(group_size, monkeypatch):
    # As wide as the columns that are gathered, and wider.
    weight, hessian = layer(1, 24, 128 if group_size == 128 else 160)
    linear = round_to_nearest(weight, Grid(3, group_size, False))
    refined, _ = refine_rows(linear, weight, hessian)
    module = "quantline.methods.integer.coordinate_descent"
    monkeypatch.setattr(f"{module}.descend_rows", plain_descend_rows)
    plain, _ = refine_rows(linear, weight, hessian)
    assert (refined.integers == plain.integers).mean() > 0.98
    assert np.allclose(refined.scales, plain.scales, rtol=2**-6)
    errors = errors_of(refined, weight, hessian)
    assert torch.allclose(errors, errors_of(plain, weight, hessian), rtol=0.02)


def test_refine_rows_gives_the_same_for_any_number_of_threads():
    weight, hessian = layer(2, 13)
    linear = round_to_nearest(weight, Grid(3, 32, False))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(refine_rows(linear, weight, hessian)[0])
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(results[0].integers, results[1].integers)
    assert np.array_equal(results[0].scales, results[1].scales)


def test_refine_rows_takes_an_input_that_is_never_seen_and_a_row_of_zeros():
    weight, hessian = layer(3)
    weight[2] = 0
    hessian[20] = hessian[:, 20] = 0
    linear = round_to_nearest(weight, Grid(4, 32, False))
    refined, _ = refine_rows(linear, weight, hessian)
    assert np.isfinite(refined.dequantize()).all() and (refined.scales > 0).all()
    assert np.array_equal(refined.integers[:, 20], linear.integers[:, 20])
    assert not refined.dequantize()[2].any()
