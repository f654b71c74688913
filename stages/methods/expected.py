"""The error that rounding is expected to leave, and the scales of the inputs that make it least.

A step of width w is off by w² / 12 in the mean square, so an output's error is the sum over its groups of
span² · Σ H_jj / s_j², where s_j multiplies column j of the weight, divides input j, and so widens the group's span. The
slope of that in log s is written down too: a column is felt through its own input and, where it is a group's least or
greatest, through the span.
"""

import numba
import numpy as np
import torch

from stages.methods.rows import over_rows

SMALLEST = 1e-4
ITERATIONS, RATE = 20, 0.15  # of Adam on log s; more of them gain nothing that the divergence shows (benchmarks/README.md)


@numba.njit(nogil=True, cache=True, fastmath=False)
def _ends(weight, scales, ends, places):
    """Per row and group the least and the greatest of the scaled weights, or 0, and the columns: [rows, groups, 2]."""
    size = weight.shape[1] // ends.shape[1]
    for row in range(len(weight)):
        for group in range(ends.shape[1]):
            least, most, low, high = np.float32(0), np.float32(0), group * size, group * size
            for j in range(group * size, (group + 1) * size):
                value = weight[row, j] * scales[j]
                if value < least:
                    least, low = value, j
                elif value > most:
                    most, high = value, j
            ends[row, group, 0], ends[row, group, 1] = least, most
            places[row, group, 0], places[row, group, 1] = low, high


def felt(weight: torch.Tensor, scales: torch.Tensor, group_size: int,
         importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ importance · span² per group [groups], half the slope of that in log s of each column [in]).

    weight [out, in], scales [in], importance [out]. On the CPU rows run in threads through a compiled kernel.
    """
    if weight.device.type != "cpu":
        return felt_at_once(weight, scales, group_size, importance)
    groups, weight = weight.shape[1] // group_size, weight.contiguous()
    ends, places = torch.empty(len(weight), groups, 2), torch.empty(len(weight), groups, 2, dtype=torch.int64)
    over_rows(len(weight), lambda rows: _ends(weight[rows].numpy(), scales.numpy(), ends[rows].numpy(), places[rows].numpy()))
    span = importance[:, None] * (ends[..., 1] - ends[..., 0])
    signed = span[..., None] * ends * torch.tensor([-1.0, 1.0])
    return (span * (ends[..., 1] - ends[..., 0])).sum(0), torch.bincount(places.reshape(-1), signed.reshape(-1), weight.shape[1])


def felt_at_once(weight: torch.Tensor, scales: torch.Tensor, group_size: int,
                 importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`felt` with all rows at once, as a GPU likes it."""
    grouped = (weight * scales).reshape(len(weight), -1, group_size)
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    span = importance[:, None, None] * (high - low)
    at_ends = ((grouped == high) * high - (grouped == low) * low) * span
    return (span * (high - low)).sum((0, 2)), at_ends.sum(0).reshape(-1)


def expected(weights: list[torch.Tensor], importance: list[torch.Tensor], diagonal: torch.Tensor, group_size: int,
             scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the expected error of all outputs, up to a factor; its slope in log s [in]); `diagonal` [in] is that of H."""
    shares = diagonal / scales**2
    spread = shares.reshape(-1, group_size).sum(1)
    squares, slopes = (sum(parts) for parts in zip(*(felt(weight, scales, group_size, outputs) for weight, outputs
                                                     in zip(weights, importance, strict=True)), strict=True))
    slope = slopes * spread.repeat_interleave(group_size) - shares * squares.repeat_interleave(group_size)
    return squares @ spread, 2 * slope


def starts(weights: list[torch.Tensor], size: torch.Tensor, group_size: int, grid: int) -> list[torch.Tensor]:
    """Scales [in] of the families of Lin et al., x^a and x^a / w^(1-a) for a in [0, 1): x is the `size` of an input, w
    its mean weight over all outputs as a share of the largest of its group.
    """
    grouped = torch.cat(weights).abs().reshape(sum(map(len, weights)), -1, group_size)
    share = (grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-20)).mean(0).reshape(-1).clamp(min=SMALLEST)
    return [size ** (step / grid) / share ** (of_weight * (1 - step / grid)) for of_weight in (0, 1) for step in range(grid)]


def expected_scales(weights: list[torch.Tensor], moment: torch.Tensor, group_size: int, grid: int,
                    importance: list[torch.Tensor]) -> torch.Tensor:
    """Scales [in] with the least expected error of weights [out, in], summed over the outputs by their `importance` [out].

    H is `moment` [in, in]; Adam starts from the best of twice `grid` starts.
    """
    diagonal = moment.diagonal().clamp(min=0)
    size = (diagonal.sqrt() / diagonal.sqrt().mean()).clamp(min=SMALLEST)

    def error(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return expected(weights, importance, diagonal, group_size, scales)

    start = min(starts(weights, size, group_size, grid), key=lambda scales: float(error(scales)[0]))
    logs = start.log()
    optimizer = torch.optim.Adam([logs], lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 1 / ITERATIONS, ITERATIONS)
    least, best = float("inf"), start
    for _ in range(ITERATIONS):
        found, slope = error(logs.exp())
        if float(found) < least:
            least, best = float(found), logs.exp()
        logs.grad = (slope / found).to(logs)
        optimizer.step()
        schedule.step()
    return best
