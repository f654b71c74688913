"""Descent on each row's error against plain references: no single move helps any more, and no row is made worse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantline.methods.integer import rtn
from quantline.methods.integer.grid import row_errors
from quantline.methods.integer.coordinate_descent import polish


def layer(seed: int, rows: int = 6, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [rows, width] and H [width, width], correlated."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(4 * width, width, generator=draw) @ torch.randn(width, width, generator=draw)
    return torch.randn(rows, width, generator=draw), mixed.T @ mixed / (4 * width)


def errors(linear, weight, moment) -> torch.Tensor:
    return row_errors(weight, torch.from_numpy(linear.dequantize()), moment)


@given(st.integers(0, 10_000), st.sampled_from([(2, 32, False), (3, 64, True), (4, 32, False), (8, 64, False)]))
def test_no_row_is_made_worse_and_most_are_better(seed, grid):
    weight, moment = layer(seed)
    linear = rtn.quantize(weight, *grid)
    found, told = polish(linear, weight, moment)
    before, after = errors(linear, weight, moment), errors(found, weight, moment)
    assert torch.allclose(told, after, rtol=1e-3)
    assert (after <= before * (1 + 1e-6)).all() and (after < 0.9 * before).any()
    assert np.array_equal(found.zeros, linear.zeros) and found.integers.max() < 2 ** grid[0]
    assert np.array_equal(found.scales, torch.from_numpy(found.scales).bfloat16().float().numpy())


@given(st.integers(0, 10_000))
def test_in_the_end_no_single_move_and_no_other_scale_helps(seed):
    weight, moment = layer(seed, 2, 32)
    found, _ = polish(rtn.quantize(weight, 3, 32, False), weight, moment, rounds=50)
    least = errors(found, weight, moment)
    for column in range(32):
        for move in (-1, 1):
            other = found.integers.astype(np.int16)
            other[:, column] += move
            inside = torch.from_numpy((other[:, column] >= 0) & (other[:, column] < 8))
            moved = errors(replace(found, integers=other.clip(0, 7).astype(np.uint8)), weight, moment)
            assert (moved >= least * (1 - 1e-4))[inside].all()
    for share in (1 - 2**-6, 1 + 2**-6):
        assert (errors(replace(found, scales=found.scales * np.float32(share)), weight, moment) > least).all()


def test_columns_beyond_those_that_are_gathered_are_felt():
    weight, moment = layer(4, 4, 256)
    found, _ = polish(rtn.quantize(weight, 3, 32, False), weight, moment, rounds=30)
    scale, zero = (torch.from_numpy(one).float().repeat_interleave(32, 1) for one in (found.scales, found.zeros))
    integers = torch.from_numpy(found.integers).float()
    best = integers - (((integers - zero) * scale - weight) @ moment) / (moment.diagonal() * scale)
    assert (best.round().clamp(0, 7) == integers).float().mean() > 0.99


def plain_settle(steps, scales, zeros, pull, felt, moment, top):
    """polish.settle, one column after another in torch."""
    steps, scales, pull = steps.clone(), scales.clone(), pull.clone()
    size, own = steps.shape[1] // scales.shape[1], moment.diagonal()
    for group in range(scales.shape[1]):
        span = slice(group * size, (group + 1) * size)
        curve = (felt[:, group, span] * steps[:, span]).sum(1)
        new = (scales[:, group] - (steps[:, span] * pull[:, span]).sum(1) / curve).bfloat16().float()
        new = torch.where((new > 0) & torch.isfinite(new), new, scales[:, group])
        pull += (new - scales[:, group])[:, None] * felt[:, group]
        scales[:, group] = new
        for j in range(span.start, span.stop):
            wanted = torch.where(own[j] > 0, (steps[:, j] - pull[:, j] / (own[j] * new)).round(), steps[:, j])
            wanted = torch.minimum(torch.maximum(wanted, -zeros[:, group]), top - zeros[:, group])
            pull += ((wanted - steps[:, j]) * new)[:, None] * moment[j]
            steps[:, j] = wanted
    return steps, scales


@pytest.mark.parametrize("group", [32, 128, 160])
def test_the_kernel_does_what_a_plain_loop_does(group, monkeypatch):
    weight, moment = layer(1, 24, 128 if group == 128 else 160)  # as wide as the columns that are gathered, and wider
    linear = rtn.quantize(weight, 3, group, False)
    found, _ = polish(linear, weight, moment)
    monkeypatch.setattr("quantline.methods.integer.coordinate_descent.settle", plain_settle)
    other, _ = polish(linear, weight, moment)
    assert (found.integers == other.integers).mean() > 0.98 and np.allclose(found.scales, other.scales, rtol=2**-6)
    assert torch.allclose(errors(found, weight, moment), errors(other, weight, moment), rtol=0.02)


def test_threads_do_not_show_in_the_result():
    weight, moment = layer(2, 13)
    linear, threads, results = rtn.quantize(weight, 3, 32, False), torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(polish(linear, weight, moment)[0])
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(results[0].integers, results[1].integers) and np.array_equal(results[0].scales, results[1].scales)


def test_an_input_that_is_never_seen_and_a_row_of_zeros():
    weight, moment = layer(3)
    weight[2] = 0
    moment[20] = moment[:, 20] = 0
    linear = rtn.quantize(weight, 4, 32, False)
    found, _ = polish(linear, weight, moment)
    assert np.isfinite(found.dequantize()).all() and (found.scales > 0).all()
    assert np.array_equal(found.integers[:, 20], linear.integers[:, 20]) and not found.dequantize()[2].any()
