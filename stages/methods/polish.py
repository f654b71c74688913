"""Coordinate descent on the error of each row: what is left to gain when GPTQ has gone over the columns once.

The error Δ H Δᵀ of a row is a quadratic form in its integers given the scales, and in its scales given the integers. Rounds
refit the scale of each group in closed form and then move each integer to its best place, both with all others fixed, so
that the error falls with every step. The descent of curvature rounding (stages/methods/curvature.py) does the same with
the output factor, where rows feel each other; here each row is on its own, and a move costs one row of H.
"""

from dataclasses import replace

import numba
import numpy as np
import torch

from stages.checkpoints.canonical import GroupedLinear
from stages.methods.rows import over_rows

ROUNDS = 2  # more hardly help (benchmarks/README.md)
COLUMNS = 128  # whose moves are gathered on a GPU before the rest hears of them


@numba.njit(nogil=True, cache=True, fastmath=False)
def _as_bfloat16(value, cell):
    """A float32 rounded to what bfloat16 holds, ties to even; `cell` is an array of one float32 to work in."""
    cell[0] = value
    bits = cell.view(np.int32)
    bits[0] = (bits[0] + 0x7FFF + ((bits[0] >> 16) & 1)) & -0x10000
    return cell[0]


@numba.njit(nogil=True, cache=True, fastmath=False)
def _polish_rows(weight, integers, zeros, scales, pull, moment, top, rounds):
    """`polish_rows` of some rows, one after another; integers and scales are changed. `pull` is Δ H."""
    width, group = weight.shape[1], weight.shape[1] // scales.shape[1]
    steps, felt, cell = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(1, np.float32)
    fitted = np.empty(scales.shape[1], np.float32)
    for row in range(len(weight)):
        slope = pull[row]
        before = np.float64(0)
        for k in range(width):
            steps[k] = integers[row, k] - zeros[row, k // group]
            before += np.float64(steps[k] * scales[row, k // group] - weight[row, k]) * slope[k]
        fitted[:] = scales[row]
        for _ in range(rounds):
            for g in range(len(fitted)):
                start = g * group
                felt[:] = 0
                for k in range(start, start + group):
                    if steps[k] != 0:
                        felt += steps[k] * moment[k]
                down, curve = np.float64(0), np.float64(0)
                for k in range(start, start + group):
                    down += np.float64(steps[k]) * slope[k]
                    curve += np.float64(steps[k]) * felt[k]
                if curve > 0:
                    new = _as_bfloat16(np.float32(fitted[g] - down / curve), cell)
                    if new > 0 and np.isfinite(new):
                        slope += (new - fitted[g]) * felt
                        fitted[g] = new
            for k in range(width):
                if not moment[k, k] > 0:
                    continue
                scale, zero = fitted[k // group], zeros[row, k // group]
                wanted = np.rint(steps[k] - slope[k] / (moment[k, k] * scale))
                wanted = min(max(wanted, -zero), top - zero)
                if wanted != steps[k]:
                    slope += (wanted - steps[k]) * scale * moment[k]
                    steps[k] = wanted
        after = np.float64(0)
        for k in range(width):
            after += np.float64(steps[k] * fitted[k // group] - weight[row, k]) * slope[k]
        if after < before:
            scales[row] = fitted
            for k in range(width):
                integers[row, k] = steps[k] + zeros[row, k // group]


def polish(linear: GroupedLinear, weight: torch.Tensor, moment: torch.Tensor, rounds: int = ROUNDS) -> GroupedLinear:
    """A rounded weight [out, in], its integers and scales moved to where Δ H Δᵀ of each row is least that the rounds find.

    H [in, in] has to be positive on its diagonal; where it is not, integers stay. Zero points stay, scales are values that
    bfloat16 holds exactly, and no row is worse than what came in. On the CPU rows run in threads through a compiled kernel.
    """
    integers, zeros, scales = (torch.from_numpy(one.astype(np.float32)).to(weight.device)
                               for one in (linear.integers, linear.zeros, linear.scales))
    run = polish_rows if weight.device.type == "cpu" else polish_all_rows
    integers, scales = run(weight, integers, zeros, scales, moment, 2**linear.bits - 1, rounds)
    return replace(linear, integers=integers.to(torch.uint8).cpu().numpy(), scales=scales.cpu().numpy())


def polish_rows(weight: torch.Tensor, integers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor,
                moment: torch.Tensor, top: int, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(integers [out, in], scales [out, groups]) after some rounds; zeros [out, groups]."""
    integers, scales, moment = integers.clone(), scales.clone(), moment.contiguous()
    group = weight.shape[1] // scales.shape[1]

    def run(rows: slice) -> None:
        dense = (integers[rows] - zeros[rows].repeat_interleave(group, 1)) * scales[rows].repeat_interleave(group, 1)
        pull = (dense - weight[rows]) @ moment
        _polish_rows(*(one.numpy() for one in (weight[rows], integers[rows], zeros[rows], scales[rows], pull, moment)),
                     np.float32(top), rounds)

    over_rows(len(weight), run)
    return integers, scales


def polish_all_rows(weight: torch.Tensor, integers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor,
                    moment: torch.Tensor, top: int, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`polish_rows` with all rows at once, as a GPU likes it."""
    width, groups = weight.shape[1], scales.shape[1]
    group, zero = width // groups, zeros.repeat_interleave(width // groups, 1)
    steps, fitted, own = integers - zero, scales.clone(), moment.diagonal()

    def error(steps: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left = steps * scales.repeat_interleave(group, 1) - weight
        product = left @ moment
        return product, (product * left).sum(1, dtype=torch.float64)

    pull, before = error(steps, scales)
    for _ in range(rounds):
        for number in range(groups):
            span = slice(number * group, (number + 1) * group)
            felt = steps[:, span] @ moment[span]
            curve = (felt[:, span] * steps[:, span]).sum(1)
            new = (fitted[:, number] - (steps[:, span] * pull[:, span]).sum(1) / curve).bfloat16().float()
            new = torch.where((new > 0) & torch.isfinite(new), new, fitted[:, number])
            pull += (new - fitted[:, number])[:, None] * felt
            fitted[:, number] = new
        for start in range(0, width, COLUMNS):
            span = slice(start, min(start + COLUMNS, width))
            near, change = pull[:, span].clone(), torch.zeros_like(pull[:, span])
            for j in range(span.start, span.stop):
                here, scale = j - start, fitted[:, j // group]
                wanted = torch.where(own[j] > 0, (steps[:, j] - near[:, here] / (own[j] * scale)).round(), steps[:, j])
                wanted = torch.minimum(torch.maximum(wanted, -zero[:, j]), top - zero[:, j])
                change[:, here] = (wanted - steps[:, j]) * scale
                steps[:, j] = wanted
                near += change[:, here, None] * moment[j, span]
            pull += change @ moment[span]
    worse = ~(error(steps, fitted)[1] < before)[:, None]
    return torch.where(worse, integers, steps + zero), torch.where(worse, scales, fitted)
