"""Curvature rounding: after any other method, move integers and scales to where the KL divergence rises least.

The divergence that a rounding error Δ [out, in] causes is about tr(G Δ H Δᵀ) / 2, with H the second moments of the
layer's inputs and G those of the gradient at its outputs (stages/checkpoints/gradients.py). Rounds alternate between the
scales, refitted in closed form given the integers, and coordinate descent on the integers given the scales. The use of
both factors for rounding follows YAQA (Tseng et al. 2025); the descent is our own.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numba
import numpy as np
import torch

from stages.checkpoints.canonical import GroupedLinear

ROUNDS = 8  # scales and integers in turn; by then the figure hardly falls any more (benchmarks/README.md)
COLUMNS = 128  # columns whose changes are gathered before the rest of P hears of them
DAMPING_IN, DAMPING_OUT = 0.01, 0.1  # shares of the mean diagonal that are added to H and G


def damped(factor: torch.Tensor, share: float) -> torch.Tensor:
    """A factor [..., n, n] plus `share` of its mean diagonal on the diagonal."""
    mean = factor.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return factor + share * mean * torch.eye(factor.shape[-1], device=factor.device)


def divergence(difference: torch.Tensor, moment: torch.Tensor, factors: torch.Tensor) -> float:
    """tr(G Δ H Δᵀ) for Δ [out, in], H [in, in] and the diagonal blocks G [blocks, size, size] of the output factor."""
    rows = difference.reshape(len(factors), -1, difference.shape[1])
    return float(((factors @ rows @ moment) * rows).sum(dtype=torch.float64))


def refit_scales(weight: torch.Tensor, steps: torch.Tensor, scales: torch.Tensor, moment: torch.Tensor,
                 factors: torch.Tensor, group_size: int) -> torch.Tensor:
    """Scales [out, groups] for fixed steps = integers - zeros: one group after another, all rows of it at once.

    With U [rows, group] the steps of a group, tr(G Δ H Δᵀ) is a quadratic form in its scales whose matrix is
    G ∘ (U H Uᵀ), positive definite as the product of two such (Schur). A scale that would turn negative stays as it is.
    Scales are values that bfloat16 holds exactly.
    """
    scales = scales.clone()
    left = (steps * scales.repeat_interleave(group_size, 1) - weight).reshape(len(factors), -1, weight.shape[1])
    grouped = steps.reshape(len(factors), left.shape[1], -1, group_size)
    shaped = scales.reshape(len(factors), left.shape[1], -1)
    for group in range(shaped.shape[2]):
        span, one, old = slice(group * group_size, (group + 1) * group_size), grouped[:, :, group], shaped[:, :, group]
        slope = (one * (factors @ (left @ moment[:, span]))).sum(2)
        matrix = damped(factors * (one @ moment[span, span] @ one.transpose(1, 2)), 1e-6)
        lower, broken = torch.linalg.cholesky_ex(matrix)
        if broken.any():
            continue
        wanted = (old - torch.cholesky_solve(slope[..., None], lower)[..., 0]).bfloat16().float()
        new = torch.where((wanted > 0) & torch.isfinite(wanted), wanted, old)
        left[:, :, span] += one * (new - old)[..., None]
        shaped[:, :, group] = new
    return scales


@numba.njit(nogil=True, cache=True, fastmath=False)
def nearest(levels, value):
    """The index of the level that is nearest to a value; levels rise."""
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if value > (levels[middle] + levels[middle + 1]) * np.float32(0.5):
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(nogil=True, cache=True, fastmath=False)
def _descend(steps, low, high, scales, pull, factor, moment, levels):
    """One pass over some columns [rows, n]; returns the change of the rounded weight [rows, n]; `steps` is changed.

    `pull` is P = G Δ H of these columns at the start. The best move of one element is -P / (G_ii H_jj); a column's own
    moves are felt at once, those of the columns before it through H. Steps are among the levels; without levels they are
    whole numbers.
    """
    rows, width = steps.shape
    change, felt = np.zeros((rows, width), np.float32), np.zeros((rows, width), np.float32)
    column = np.empty(rows, np.float32)
    for j in range(width):
        column[:] = pull[:, j]
        for before in range(j):
            if moment[before, j] != 0:
                for i in range(rows):
                    column[i] += felt[i, before] * moment[before, j]
        own = moment[j, j]
        for i in range(rows):
            scale = scales[i, j]
            wanted = steps[i, j] - column[i] / (factor[i, i] * own * scale)
            wanted = levels[nearest(levels, wanted)] if len(levels) else np.rint(wanted)
            wanted = min(max(wanted, low[i, j]), high[i, j])
            if wanted != steps[i, j]:
                move = (wanted - steps[i, j]) * scale
                steps[i, j] = wanted
                change[i, j] += move
                for k in range(rows):
                    felt[k, j] += factor[i, k] * move
                    column[k] += factor[i, k] * move * own
    return change


def descend(weight: torch.Tensor, steps: torch.Tensor, low: torch.Tensor, high: torch.Tensor, scales: torch.Tensor,
            moment: torch.Tensor, factors: torch.Tensor, passes: int = 1,
            levels: torch.Tensor | None = None) -> torch.Tensor:
    """Steps (integers minus zeros) [out, in] after coordinate descent on tr(G Δ H Δᵀ), each within low … high.

    `scales` [out, in], not zero; all on the CPU, where the kernel runs. H and the blocks of G have to be positive on their
    diagonals. With `levels`, rising, steps are among them instead of among the whole numbers. Rows of different blocks
    of G do not feel each other and run in threads; the result does not depend on their number.
    """
    steps, size = steps.clone(), len(weight) // len(factors)
    grid = np.empty(0, np.float32) if levels is None else levels.numpy()

    def run(number: int) -> None:
        rows, factor = slice(number * size, (number + 1) * size), factors[number].contiguous()
        pull = factor @ (steps[rows] * scales[rows] - weight[rows]) @ moment
        for _ in range(passes):
            for start in range(0, weight.shape[1], COLUMNS):
                span = slice(start, start + COLUMNS)
                part = steps[rows, span].contiguous()
                change = _descend(part.numpy(), *(one[rows, span].contiguous().numpy() for one in (low, high, scales)),
                                  pull[:, span].contiguous().numpy(), factor.numpy(),
                                  moment[span, span].contiguous().numpy(), grid)
                steps[rows, span] = part
                pull += factor @ torch.from_numpy(change) @ moment[span]

    with ThreadPoolExecutor(min(len(factors), torch.get_num_threads())) as pool:
        list(pool.map(run, range(len(factors))))
    return steps


def refine(linear: GroupedLinear, weight: torch.Tensor, moment: torch.Tensor, factors: torch.Tensor,
           rounds: int = ROUNDS) -> GroupedLinear:
    """A rounded weight [out, in], its integers and scales moved to the least tr(G Δ H Δᵀ) that the rounds find.

    Zero points stay. The result is never worse than what came in.
    """
    inner, outer = damped(moment, DAMPING_IN), damped(factors, DAMPING_OUT)
    zeros = torch.from_numpy(linear.zeros).to(weight.device).float().repeat_interleave(linear.group_size, 1)
    steps, scales = (torch.from_numpy(one).to(weight.device).float() for one in (linear.integers, linear.scales))
    steps, low, high = steps - zeros, -zeros, 2**linear.bits - 1 - zeros
    host = [one.cpu() for one in (weight, low, high, inner, outer)]

    def cost(steps: torch.Tensor, scales: torch.Tensor) -> float:
        return divergence(steps * scales.repeat_interleave(linear.group_size, 1) - weight, inner, outer)

    best = (cost(steps, scales), steps, scales)
    for _ in range(rounds):
        scales = refit_scales(weight, steps, scales, inner, outer, linear.group_size)
        steps = descend(host[0], steps.cpu(), *host[1:3], scales.repeat_interleave(linear.group_size, 1).cpu(),
                        *host[3:]).to(weight.device)
        best = min(best, (cost(steps, scales), steps, scales), key=lambda found: found[0])
    return replace(linear, integers=(best[1] + zeros).to(torch.uint8).cpu().numpy(), scales=best[2].cpu().numpy())
