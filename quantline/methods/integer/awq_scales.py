"""The error that rounding is expected to leave, and the input scales that make it least.

A step of width w is off by w² / 12 in the mean square, so an output's error is proportional to the
sum over its groups of range² · Σ H_jj / s_j², where s_j multiplies column j of the weight, divides
input j, and so widens the group's range. The slope of that in log s has a closed form too: a column
matters through its own input and, where it is a group's least or greatest, through the range.
"""

import numba
import numpy as np
import torch

from quantline.methods.integer import adam
from quantline.methods.threads import in_threads

SMALLEST = 1e-4  # of a share that is divided by
# Rows that are summed together, whatever the number of threads, so that this does not change sums.
ROWS = 256
# Of Adam on log s; more of them gain nothing that shows (benchmarks/small_models.md).
ITERATIONS = 20
RATE = 0.15


@numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def _add_ranges(
    weight: np.ndarray,
    scales: np.ndarray,
    importance: np.ndarray,
    squares: np.ndarray,
    slopes: np.ndarray,
) -> None:
    """Add `sum_ranges` of some rows to squares [groups] and slopes [in]."""
    size = len(slopes) // len(squares)
    values = np.empty(size, np.float32)
    for row in range(len(weight)):
        for group in range(len(squares)):
            start = group * size
            weights = weight[row, start : start + size]
            group_scales = scales[start : start + size]
            least = np.float32(0)
            most = np.float32(0)
            for j in range(size):
                values[j] = weights[j] * group_scales[j]
                least = min(least, values[j])
                most = max(most, values[j])
            weighted_range = importance[row] * (most - least)
            squares[group] += weighted_range * (most - least)
            for end, sign in ((least, -1), (most, 1)):
                for j in range(size if end else 0):
                    if values[j] == end:
                        slopes[start + j] += sign * weighted_range * end
                        break


def sum_ranges(
    weight: torch.Tensor, scales: torch.Tensor, group_size: int, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Σ importance · range² of each group, and half its slope in the columns' log s.

    On the CPU rows run in threads through a compiled kernel.

    Args:
        weight: float32 [out, in].
        scales: s, float32 [in].
        group_size: Inputs that share a scale of the grid.
        importance: Of the outputs, float32 [out].

    Returns:
        float32 [groups] and float32 [in].
    """
    if weight.device.type != "cpu":
        return sum_ranges_at_once(weight, scales, group_size, importance)
    starts = range(0, len(weight), ROWS)
    weight = weight.contiguous()
    importance = importance.contiguous()
    columns = weight.shape[1]
    squares = torch.zeros(len(starts), columns // group_size, dtype=torch.float64)
    slopes = torch.zeros(len(starts), columns, dtype=torch.float64)

    def run(number: int) -> None:
        rows = slice(starts[number], starts[number] + ROWS)
        _add_ranges(
            weight[rows].numpy(),
            scales.numpy(),
            importance[rows].numpy(),
            squares[number].numpy(),
            slopes[number].numpy(),
        )

    in_threads(range(len(starts)), run)
    return squares.sum(0).float(), slopes.sum(0).float()


def sum_ranges_at_once(
    weight: torch.Tensor, scales: torch.Tensor, group_size: int, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `sum_ranges` does, with all rows in one tensor operation, for GPUs."""
    groups = (weight * scales).reshape(len(weight), -1, group_size)
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    weighted_range = importance[:, None, None] * (high - low)
    at_ends = ((groups == high) * high - (groups == low) * low) * weighted_range
    squares = (weighted_range * (high - low)).sum((0, 2))
    return squares, at_ends.sum(0).reshape(-1)


def expected_error(
    weights: list[torch.Tensor],
    importance: list[torch.Tensor],
    diagonal: torch.Tensor,
    group_size: int,
    scales: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the expected error of all outputs, up to a factor, and its slope in log s.

    Args:
        weights: Of the layers that read one input, float32 [out, in] each.
        importance: Of their outputs, float32 [out] each.
        diagonal: Of H, float32 [in].
        group_size: Inputs that share a scale of the grid.
        scales: s, float32 [in].

    Returns:
        float32 [] and float32 [in].
    """
    input_errors = diagonal / scales**2
    group_errors = input_errors.reshape(-1, group_size).sum(1)
    ranges = [
        sum_ranges(weight, scales, group_size, outputs)
        for weight, outputs in zip(weights, importance, strict=True)
    ]
    nothing = torch.zeros_like(diagonal[0])
    squares = sum((squares for squares, _ in ranges), start=nothing)
    slopes = sum((slopes for _, slopes in ranges), start=nothing)
    through_range = slopes * group_errors.repeat_interleave(group_size)
    through_input = input_errors * squares.repeat_interleave(group_size)
    return squares @ group_errors, 2 * (through_range - through_input)


def candidate_scales(
    weights: list[torch.Tensor], input_magnitude: torch.Tensor, group_size: int, steps: int
) -> list[torch.Tensor]:
    """Return scales of the families of Lin et al., x^a and x^a / w^(1-a), for a in [0, 1).

    Args:
        weights: Of the layers that read one input, float32 [out, in] each. w is the mean weight of
            an input over all outputs, as a share of the largest of its group.
        input_magnitude: x, the inputs' root mean squares over their mean, float32 [in].
        group_size: Inputs that share a scale of the grid.
        steps: Exponents a of each family.
    """
    outputs = sum(len(weight) for weight in weights)
    groups = torch.cat(weights).abs().reshape(outputs, -1, group_size)
    shares = groups / groups.amax(-1, keepdim=True).clamp(min=1e-20)
    share = shares.mean(0).reshape(-1).clamp(min=SMALLEST)
    candidates = []
    for weight_power in (0, 1):
        for step in range(steps):
            exponent = step / steps
            candidates.append(input_magnitude**exponent / share ** (weight_power * (1 - exponent)))
    return candidates


def search_expected_scales(
    weights: list[torch.Tensor],
    hessian: torch.Tensor,
    group_size: int,
    steps: int,
    importance: list[torch.Tensor],
) -> torch.Tensor:
    """Return the scales with the least expected error; Adam starts from the best candidate.

    Args:
        weights: Of the layers that read one input, float32 [out, in] each.
        hessian: H, float32 [in, in].
        group_size: Inputs that share a scale of the grid.
        steps: Of `candidate_scales`.
        importance: Of the outputs, float32 [out] each.

    Returns:
        float32 [in].
    """
    diagonal = hessian.diagonal().clamp(min=0)
    input_magnitude = (diagonal.sqrt() / diagonal.sqrt().mean()).clamp(min=SMALLEST)

    def error(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return expected_error(weights, importance, diagonal, group_size, scales)

    candidates = candidate_scales(weights, input_magnitude, group_size, steps)
    start = min(candidates, key=lambda scales: float(error(scales)[0]))
    logs = start.log()
    moments = adam.Moments.zeros(logs)
    least = float("inf")
    best = start
    for step in range(ITERATIONS):
        value, slope = error(logs.exp())
        if float(value) < least:
            least = float(value)
            best = logs.exp()
        rate = RATE * (1 + (1 / ITERATIONS - 1) * step / ITERATIONS)
        adam.move(logs, moments, (slope / value).to(logs), step + 1, rate)
    return best
