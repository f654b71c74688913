"""AWQ (Lin et al. 2023, sections 3.2 and 3.3): scale up the inputs that matter, then clip, then round.

The search needs the second moments alone: scales are diag(H)^(a/2) for a in [0, 1], and the best a has the least
Σ tr(ΔW H ΔWᵀ) over the linear layers that read the same input. Dividing the input by the scales is the business of
whatever comes before; see stages/quantize.py.
"""

import torch

from stages.checkpoints.canonical import GroupedLinear
from stages.methods import rtn
from stages.methods.grid import output_error

SMALLEST = 1e-4


def scaled_moment(moment: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """H of the input after it was divided by `scales` [in]."""
    return moment / scales[:, None] / scales[None, :]


def scaled_factors(factors: torch.Tensor | None, divisors: torch.Tensor) -> torch.Tensor | None:
    """G [blocks, size, size] of an output that was divided by `divisors` [out]: its gradient grew by as much."""
    if factors is None:
        return None
    grown = divisors.reshape(len(factors), -1)
    return factors * grown[:, :, None] * grown[:, None, :]


def search_scales(weights: list[torch.Tensor], moment: torch.Tensor, bits: int, group_size: int, symmetric: bool,
                  grid: int, divisors: list[torch.Tensor] | None = None) -> tuple[torch.Tensor, float] | None:
    """(scales [in], exponent a) for weights [out, in] that read one input; a = 0 is no scaling at all.

    Where the rows of a weight will be divided by `divisors` [out], for what comes after it, it is rounded like that.
    No layer may have a larger error than round-to-nearest gives it; None if even a = 0 cannot keep that.
    """
    divisors = divisors or [torch.ones(len(weight)) for weight in weights]
    size = moment.diagonal().clamp(min=0).sqrt()
    size = (size / size.mean()).clamp(min=SMALLEST)

    def errors(scales: torch.Tensor, divisors: list[torch.Tensor]) -> list[float]:
        found = []
        for weight, divisor in zip(weights, divisors, strict=True):
            rounded = rtn.quantize(weight * scales / divisor[:, None], bits, group_size, symmetric).dequantize()
            found.append(output_error(weight, torch.from_numpy(rounded) * divisor[:, None] / scales, moment))
        return found

    limits = errors(torch.ones_like(size), [torch.ones_like(divisor) for divisor in divisors])
    best = None
    for step in range(grid):
        scales = size ** (step / grid)
        scales = scales / (scales.max() * scales.min()).sqrt()
        found = errors(scales, divisors)
        if all(error <= limit for error, limit in zip(found, limits, strict=True)) and (best is None or sum(found) < best[0]):
            best = (sum(found), scales, step / grid)
    return best and best[1:]


def quantize(weight: torch.Tensor, moment: torch.Tensor, bits: int, group_size: int,
             symmetric: bool) -> GroupedLinear:
    """A weight [out, in] that was scaled already, rounded to the better of the clipped and the min-max grid.

    `moment` belongs to the scaled input. Per group, clipping keeps the span with the least diag(H)-weighted error;
    where that does not lower the whole layer's error, the min-max grid stays.
    """
    candidates = [rtn.quantize(weight, bits, group_size, symmetric, importance)
                  for importance in (None, moment.diagonal())]
    return min(candidates, key=lambda one: output_error(weight, torch.from_numpy(one.dequantize()), moment))
