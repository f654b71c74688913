"""Curvature rounding: after any other method, move integers and scales to where the KL divergence rises least.

The divergence that a rounding error Δ [out, in] causes is about tr(G Δ H Δᵀ) / 2, with H the second moments of the
layer's inputs and G those of the gradient at its outputs (quantline/calibration/output_moments.py). Rounds alternate between the
scales, refitted given the integers, and coordinate descent on the integers given the scales. The use of
both factors for rounding follows YAQA (Tseng et al. 2025); the descent is our own.
"""

from collections.abc import Callable
from dataclasses import replace

import numba
import numpy as np
import torch

from quantline.quantized.store import GroupedLinear
from quantline.methods.threads import in_threads

ROUNDS = 8  # over the integers; by then the figure hardly falls any more (benchmarks/README.md)
REFITS = 4  # of these, the first; after them the scales stay
SETTLED = 0.997  # share of integers that stay in a round after which there is no other
STEPS = 2  # of conjugate gradients in each; the rounds do the rest
TOGETHER = 16  # rows of a column that are passed over together where none of them is further than half a step from its best
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


def solved(times: Callable[[torch.Tensor], torch.Tensor], diagonal: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """x [blocks, rows, n] with A x = b, block by block, by some steps of conjugate gradients from 0 with the diagonal as
    preconditioner (Golub and Van Loan, 11.5). `times` is A's product with such a tensor.

    Every step lowers xᵀ A x - 2 bᵀ x. Where the diagonal is not positive, x stays 0.
    """
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    found, left = torch.zeros_like(right), right
    step = toward = inverse * left
    size = (left * toward).sum((1, 2), keepdim=True)
    for _ in range(STEPS):
        turned = times(step)
        curve = (step * turned).sum((1, 2), keepdim=True)
        length = torch.where(curve > 0, size / curve, 0)
        found, left = found + length * step, left - length * turned
        toward, before = inverse * left, size
        size = (left * toward).sum((1, 2), keepdim=True)
        step = toward + torch.where(before > 0, size / before, 0) * step
    return found


def refit_scales(steps: torch.Tensor, scales: torch.Tensor, product: torch.Tensor, moment: torch.Tensor,
                 factors: torch.Tensor, group_size: int) -> torch.Tensor:
    """Scales [out, groups] for fixed steps = integers - zeros, those of all groups at once.

    `product` [out, in] is Δ H and follows. tr(G Δ H Δᵀ) is a quadratic form in the scales: with U_g [rows, group] the steps of
    a group, its slope is the row sums of U_g ∘ (G Δ H)_g and its curvature in one scale G_ii (U_g H_gg U_gᵀ)_ii. A scale that
    would turn negative stays as it is. Scales are values that bfloat16 holds exactly.
    """
    shape = (*factors.shape[:2], scales.shape[1], group_size)
    grouped, old = steps.reshape(shape), scales.reshape(shape[:3])

    def felt(change: torch.Tensor) -> torch.Tensor:
        return (grouped * change[..., None]).reshape(steps.shape) @ moment

    def slope(product: torch.Tensor) -> torch.Tensor:
        return (grouped * (factors @ product.reshape(*shape[:2], -1)).reshape(shape)).sum(3)

    own = torch.stack([moment[start:start + group_size, start:start + group_size]
                       for start in range(0, len(moment), group_size)])
    heavy = (steps.reshape(len(steps), -1, group_size).transpose(0, 1) @ own).transpose(0, 1).reshape(shape)
    diagonal = (heavy * grouped).sum(3) * factors.diagonal(dim1=1, dim2=2)[..., None]
    wanted = (old + solved(lambda change: slope(felt(change)), diagonal, -slope(product))).bfloat16().float()
    new = torch.where((wanted > 0) & torch.isfinite(wanted), wanted, old)
    product += felt(new - old)
    return new.reshape(scales.shape)


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
    """One pass over some columns, turned: all are [n, rows]; returns the change of the rounded weight; `steps` is changed.

    `pull` is P = G Δ H of these columns at the start. The best move of one element is -P / (G_ii H_jj); a column's own
    moves are felt at once, those of the columns before it through H. Steps are among the levels; without levels they are
    whole numbers.
    """
    width, rows = steps.shape
    change, felt, moved, count = np.zeros((width, rows), np.float32), np.empty((width, rows), np.float32), np.empty(width, np.int64), 0
    column, diagonal, nearby = np.empty(rows, np.float32), np.empty(rows, np.float32), np.float32(0.499)
    for i in range(rows):
        diagonal[i] = factor[i, i]
    for k in range(len(levels) - 1):
        nearby = min(nearby, np.float32(0.499) * (levels[k + 1] - levels[k]))
    for j in range(width):
        start, own, still = pull[j], moment[j, j], True
        for k in range(count):
            share = moment[moved[k], j]
            for i in range(rows):
                start[i] += felt[k, i] * share
        column[:] = start
        for first in range(0, rows, TOGETHER):
            last = min(first + TOGETHER, rows)
            far = 0
            for i in range(first, last):
                far += abs(column[i]) > nearby * own * diagonal[i] * abs(scales[j, i])
            if not far:
                continue
            for i in range(first, last):
                scale = scales[j, i]
                wanted = steps[j, i] - column[i] / (diagonal[i] * own * scale)
                wanted = levels[nearest(levels, wanted)] if len(levels) else np.rint(wanted)
                wanted = min(max(wanted, low[j, i]), high[j, i])
                if wanted != steps[j, i]:
                    move, still = (wanted - steps[j, i]) * scale, False
                    steps[j, i] = wanted
                    change[j, i] = move
                    move *= own
                    for k in range(rows):
                        column[k] += factor[i, k] * move
        if not still:  # G times the change, told from what the column felt of it
            felt[count] = (column - start) / own
            moved[count] = j
            count += 1
    return change


def descend(steps: torch.Tensor, low: torch.Tensor, high: torch.Tensor, scales: torch.Tensor, product: torch.Tensor,
            moment: torch.Tensor, factors: torch.Tensor, levels: torch.Tensor | None = None) -> torch.Tensor:
    """Steps (integers minus zeros) [out, in] after one pass of coordinate descent on tr(G Δ H Δᵀ), each within low … high.

    `scales` [out, in], not zero; `product` [out, in] is Δ H and follows. All on the CPU, where the kernel runs. H and the
    blocks of G have to be positive on their diagonals. With `levels`, rising, steps are among them instead of among the
    whole numbers. Rows of different blocks of G do not feel each other and run in threads; the result does not depend on
    their number.
    """
    steps, size = steps.clone(), factors.shape[1]
    grid = np.empty(0, np.float32) if levels is None else levels.numpy()

    def run(number: int) -> None:
        rows, factor = slice(number * size, (number + 1) * size), factors[number].contiguous()
        for start in range(0, steps.shape[1], COLUMNS):
            span = slice(start, start + COLUMNS)
            part = steps[rows, span].T.contiguous()
            change = _descend(part.numpy(), *(one[rows, span].T.contiguous().numpy() for one in (low, high, scales)),
                              (product[rows, span].T @ factor).numpy(), factor.numpy(),
                              moment[span, span].contiguous().numpy(), grid)
            steps[rows, span] = part.T
            product[rows] += torch.from_numpy(change).T @ moment[span]

    in_threads(range(len(factors)), run)
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
    host = [one.cpu() for one in (inner, outer)]

    def difference() -> torch.Tensor:
        return steps * scales.repeat_interleave(linear.group_size, 1) - weight

    before = divergence(difference(), inner, outer)
    product = difference() @ inner
    for number in range(rounds):
        if number < REFITS:
            scales = refit_scales(steps, scales, product, inner, outer, linear.group_size)
        on_host = product.cpu()
        moved = descend(steps.cpu(), low.cpu(), high.cpu(), scales.repeat_interleave(linear.group_size, 1).cpu(), on_host,
                        *host).to(weight.device)
        product, still, steps = on_host.to(weight.device), (moved == steps).float().mean(), moved
        if still >= SETTLED:
            break
    if not divergence(difference(), inner, outer) <= before:
        return linear
    return replace(linear, integers=(steps + zeros).to(torch.uint8).cpu().numpy(), scales=scales.cpu().numpy())
