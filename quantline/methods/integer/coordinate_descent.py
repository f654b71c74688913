"""Coordinate descent on the error of each row: what is left to gain when GPTQ has gone over the columns once.

The error Δ H Δᵀ of a row is a quadratic form in its integers given the scales, and in its scales given the integers. Rounds
refit the scale of each group in closed form and then move each of its integers to its best place, both with all others
fixed, so that the error falls with every step. The descent of curvature rounding (quantline/methods/integer/curvature.py) does the
same with the output factor, where rows feel each other; here each row is on its own. Moves are felt at once within some
neighbouring columns, and by the rest of the row in one product when these are done.
"""

from dataclasses import replace

import numba
import numpy as np
import torch

from quantline.quantized.store import GroupedLinear
from quantline.methods.integer.grid import rows_of
from quantline.methods.threads import on_host, over_rows

ROUNDS = 2  # more hardly help (benchmarks/README.md)
COLUMNS = 128  # whose moves are gathered, if a group is not wider


@numba.njit(nogil=True, cache=True, fastmath=False)
def _as_bfloat16(value, cell):
    """A float32 rounded to what bfloat16 holds, ties to even; `cell` is an array of one float32 to work in."""
    cell[0] = value
    bits = cell.view(np.int32)
    bits[0] = (bits[0] + 0x7FFF + ((bits[0] >> 16) & 1)) & -0x10000
    return cell[0]


@numba.njit(nogil=True, cache=True, fastmath=False)
def _settle_rows(steps, scales, zeros, pull, felt, moment, top):
    """`settle` of some rows, one after another; steps, scales and pull are changed."""
    groups, width = felt.shape[1], felt.shape[2]
    size, cell, rate = width // groups, np.empty(1, np.float32), np.empty(width, np.float32)
    for k in range(width):
        rate[k] = 1 / moment[k, k] if moment[k, k] > 0 else 0
    for row in range(len(steps)):
        slope = pull[row]
        for g in range(groups):
            span = slice(g * size, (g + 1) * size)  # loops from 0 over parts become vector instructions
            step, own, own_rate, own_felt = steps[row, span], slope[span], rate[span], felt[row, g, span]
            down, curve = np.float64(0), np.float64(0)
            for k in range(size):
                down += step[k] * own[k]
                curve += step[k] * own_felt[k]
            if curve > 0:
                new = _as_bfloat16(np.float32(scales[row, g] - down / curve), cell)
                if new > 0 and np.isfinite(new):
                    slope += (new - scales[row, g]) * felt[row, g]
                    scales[row, g] = new
            scale, zero = scales[row, g], zeros[row, g]
            inverse = 1 / scale
            for k in range(size):
                wanted = np.rint(step[k] - own[k] * own_rate[k] * inverse)
                wanted = min(max(wanted, -zero), top - zero)
                if wanted != step[k] and own_rate[k] > 0:
                    move, column = (wanted - step[k]) * scale, moment[span.start + k]
                    for i in range(width):
                        slope[i] += move * column[i]
                    step[k] = wanted


def settle(steps: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, pull: torch.Tensor, felt: torch.Tensor,
           moment: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(steps, scales) after one round over n neighbouring columns: each group's scale, then its integers.

    steps = integers - zeros [rows, n]; scales and zeros [rows, groups]; `pull` [rows, n] is Δ H of these columns; `moment`
    [n, n] their part of H, and `felt` [rows, groups, n] what of it the steps of each group feel. Columns whose diagonal is
    not positive keep their integers. Rows run in threads through a compiled kernel, on the CPU as those of GPTQ.
    """
    home, (steps, scales, pull) = steps.device, (on_host(one) for one in (steps, scales, pull))
    zeros, felt, moment = (one.cpu().contiguous() for one in (zeros, felt, moment))

    def run(rows: slice) -> None:
        _settle_rows(*(one[rows].numpy() for one in (steps, scales, zeros, pull, felt)), moment.numpy(), np.float32(top))

    over_rows(len(steps), run)
    return steps.to(home), scales.to(home)


def polish(linear: GroupedLinear, weight: torch.Tensor, moment: torch.Tensor,
           rounds: int = ROUNDS) -> tuple[GroupedLinear, torch.Tensor]:
    """(a rounded weight [out, in], its integers and scales moved to where Δ H Δᵀ of each row is least that the rounds find,
    and that error, float64 [out]).

    H [in, in] has to be positive on its diagonal; where it is not, integers stay. Zero points stay, scales are values that
    bfloat16 holds exactly, and no row is worse than what came in.
    """
    integers, zeros, scales = (torch.from_numpy(one.astype(np.float32)).to(weight.device)
                               for one in (linear.integers, linear.zeros, linear.scales))
    size = linear.group_size
    steps, at_once = integers - zeros.repeat_interleave(size, 1), max(1, COLUMNS // size)

    def errors() -> torch.Tensor:
        return (pull * (steps * scales.repeat_interleave(size, 1) - weight)).sum(1, dtype=torch.float64)

    pull = (steps * scales.repeat_interleave(size, 1) - weight) @ moment
    before = errors()
    for _ in range(rounds):
        for group in range(0, scales.shape[1], at_once):
            groups = slice(group, min(group + at_once, scales.shape[1]))
            span = slice(groups.start * size, groups.stop * size)
            own, grouped = moment[span, span], steps[:, span].reshape(len(steps), -1, size).transpose(0, 1)
            felt = (grouped @ own.reshape(-1, size, own.shape[1])).transpose(0, 1)
            step, scale = settle(steps[:, span], scales[:, groups], zeros[:, groups], pull[:, span], felt, own, 2**linear.bits - 1)
            change = step * scale.repeat_interleave(size, 1) - steps[:, span] * scales[:, groups].repeat_interleave(size, 1)
            steps[:, span], scales[:, groups] = step, scale
            pull += change @ moment[span]
    after, integers = errors(), (steps + zeros.repeat_interleave(size, 1)).to(torch.uint8).cpu().numpy()
    moved = replace(linear, integers=integers, scales=scales.cpu().numpy())
    return rows_of(linear, moved, after < before), torch.where(after < before, after, before)
