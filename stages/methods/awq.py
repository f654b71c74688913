"""AWQ (Lin et al. 2023, section 3.2): scale up the inputs that matter. Clipping and rounding are in stages/methods/spans.py.

The authors search one exponent by rounding again and again. Here the error that rounding is expected to leave is written
down and minimized: a step of width w is off by w² / 12 in the mean square, so an output's error is the sum over its groups
of w² / 12 · Σ H_jj / s_j², where s_j divides input j and widens the group's span. That needs the calibration's moments
alone. Dividing the input by the scales is the business of whatever comes before; see stages/recipes/inputs.py.
"""

import torch

from stages.methods import rtn
from stages.methods.grid import row_errors

SMALLEST = 1e-4
ITERATIONS, RATE = 20, 0.15  # of Adam on log s; more of them gain nothing that the divergence shows (benchmarks/README.md)


def scaled_moment(moment: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """H of the input after it was divided by `scales` [in]."""
    return moment / scales[:, None] / scales[None, :]


def scaled_factors(factors: torch.Tensor | None, divisors: torch.Tensor) -> torch.Tensor | None:
    """G [blocks, size, size] of an output that was divided by `divisors` [out]: its gradient grew by as much."""
    if factors is None:
        return None
    grown = divisors.reshape(len(factors), -1)
    return factors * grown[:, :, None] * grown[:, None, :]


def starts(weights: list[torch.Tensor], size: torch.Tensor, group_size: int, grid: int) -> list[torch.Tensor]:
    """Scales [in] of the authors' families, x^a and x^a / w^(1-a) for a in [0, 1): x is the `size` of an input, w its
    mean weight over all outputs as a share of the largest of its group.
    """
    grouped = torch.cat(weights).abs().reshape(sum(map(len, weights)), -1, group_size)
    share = (grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-20)).mean(0).reshape(-1).clamp(min=SMALLEST)
    return [size ** (step / grid) / share ** (of_weight * (1 - step / grid)) for of_weight in (0, 1) for step in range(grid)]


def expected_scales(weights: list[torch.Tensor], moment: torch.Tensor, group_size: int, grid: int,
                    divisors: list[torch.Tensor], importance: list[torch.Tensor]) -> torch.Tensor:
    """Scales [in] with the least expected error, summed over the outputs by their `importance` [out]."""
    diagonal = moment.diagonal().clamp(min=0)
    size = (diagonal.sqrt() / diagonal.sqrt().mean()).clamp(min=SMALLEST)

    def expected(scales: torch.Tensor) -> torch.Tensor:
        spread = (diagonal / scales**2).reshape(-1, group_size).sum(1)
        total = torch.zeros((), device=scales.device)
        for weight, divisor, outputs in zip(weights, divisors, importance, strict=True):
            grouped = (weight * scales).reshape(len(weight), -1, group_size)
            span = grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0)
            total = total + outputs @ (span**2 @ spread)
        return total

    with torch.no_grad():
        start = min(starts(weights, size, group_size, grid), key=lambda scales: float(expected(scales)))
    logs = start.log().requires_grad_(True)
    optimizer = torch.optim.Adam([logs], lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 1 / ITERATIONS, ITERATIONS)
    least, best = float("inf"), start
    for _ in range(ITERATIONS):
        optimizer.zero_grad()
        error = expected(logs.exp()).log()
        if error.item() < least:
            least, best = error.item(), logs.detach().exp()
        error.backward()
        optimizer.step()
        schedule.step()
    return best


def search_scales(weights: list[torch.Tensor], moment: torch.Tensor, bits: int, group_size: int, symmetric: bool,
                  grid: int, divisors: list[torch.Tensor] | None = None,
                  importance: list[torch.Tensor] | None = None) -> tuple[torch.Tensor, float] | None:
    """(scales [in], how far they go) for weights [out, in] that read one input; 0 is no scaling at all, 1 the whole way.

    On the way from no scaling to the scales with the least expected error, the place is taken where rounding to nearest
    leaves the least Σ importance · Δ H Δᵀ over all outputs; `importance` [out] is 1 where it is not given. Rows of a weight
    that will be divided by `divisors` [out], for what comes after it, are rounded like that.
    No layer may have a larger error than round-to-nearest gives it; None if not even 0 can keep that.
    """
    plain = [torch.ones_like(weight[:, 0]) for weight in weights]
    divisors, importance = divisors or plain, importance or plain

    def errors(scales: torch.Tensor, divisors: list[torch.Tensor]) -> list[float]:
        found = []
        for weight, divisor, outputs in zip(weights, divisors, importance, strict=True):
            rounded = rtn.quantize(weight * scales / divisor[:, None], bits, group_size, symmetric).dequantize()
            stored = torch.from_numpy(rounded).to(weight.device) * divisor[:, None] / scales
            found.append(float(row_errors(weight, stored, moment) @ outputs.double()))
        return found

    direction = expected_scales(weights, moment, group_size, grid, divisors, importance).log()
    limits, best = errors(torch.ones_like(direction), plain), None
    for reach in (0.0, 0.25, 0.5, 0.75, 1.0):
        scales = (direction * reach).exp()
        scales = scales / (scales.max() * scales.min()).sqrt()
        found = errors(scales, divisors)
        if all(error <= limit for error, limit in zip(found, limits, strict=True)) and (best is None or sum(found) < best[0]):
            best = (sum(found), scales, reach)
    return best and best[1:]
