"""The error that rounding is expected to leave, and the scales of the inputs that make it least.

A step of width w is off by w² / 12 in the mean square, so an output's error is the sum over its groups of
span² · Σ H_jj / s_j², where s_j multiplies column j of the weight, divides input j, and so widens the group's span. The
slope of that in log s is written down too: a column is felt through its own input and, where it is a group's least or
greatest, through the span.
"""

import numba
import numpy as np
import torch

from quantline.methods.threads import in_threads

SMALLEST = 1e-4
ROWS = 256  # that are summed together, whatever the number of threads, so that this does not show in the sums
ITERATIONS, RATE = 20, 0.15  # of Adam on log s; more of them gain nothing that the divergence shows (benchmarks/README.md)


@numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def _felt(weight, scales, importance, squares, slopes):
    """`felt` of some rows, added to squares [groups] and slopes [in]."""
    size = len(slopes) // len(squares)
    values = np.empty(size, np.float32)
    for row in range(len(weight)):
        for group in range(len(squares)):
            start = group * size
            weights, own, least, most = weight[row, start:start + size], scales[start:start + size], np.float32(0), np.float32(0)
            for j in range(size):
                values[j] = weights[j] * own[j]
                least, most = min(least, values[j]), max(most, values[j])
            span = importance[row] * (most - least)
            squares[group] += span * (most - least)
            for end, sign in ((least, -1), (most, 1)):
                for j in range(size if end else 0):
                    if values[j] == end:
                        slopes[start + j] += sign * span * end
                        break


def felt(weight: torch.Tensor, scales: torch.Tensor, group_size: int,
         importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ importance · span² per group [groups], half the slope of that in log s of each column [in]).

    weight [out, in], scales [in], importance [out]. On the CPU rows run in threads through a compiled kernel.
    """
    if weight.device.type != "cpu":
        return felt_at_once(weight, scales, group_size, importance)
    starts, weight, importance = range(0, len(weight), ROWS), weight.contiguous(), importance.contiguous()
    squares = torch.zeros(len(starts), weight.shape[1] // group_size, dtype=torch.float64)
    slopes = torch.zeros(len(starts), weight.shape[1], dtype=torch.float64)

    def run(number: int) -> None:
        rows = slice(starts[number], starts[number] + ROWS)
        _felt(weight[rows].numpy(), scales.numpy(), importance[rows].numpy(), squares[number].numpy(), slopes[number].numpy())

    in_threads(range(len(starts)), run)
    return squares.sum(0).float(), slopes.sum(0).float()


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
