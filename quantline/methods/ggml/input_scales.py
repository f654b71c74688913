"""AWQ's scales of inputs (Lin et al. 2023, section 3.2) for ggml's blocks: columns that share a sub-block made alike.

The direction is that of quantline/methods/integer/awq_scales.py, where each type counts by the step of its grid; how far to go is judged
by what ggml's own rounding of the scaled weights leaves of tr(G Δ H Δᵀ).
"""

import torch

from quantline.methods.ggml import quantize as kquant
from quantline.methods.integer.curvature import divergence
from quantline.methods.integer.awq_scales import expected_scales
from quantline.methods.ggml.block_types import block_type, dequantize

REACHES = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the way to the scales with the least expected error, in their logarithms
GRID = 20  # of expected.starts


def direction(weights: list[torch.Tensor], kinds: list[str], moment: torch.Tensor,
              factors: list[torch.Tensor]) -> torch.Tensor:
    """The logarithms [in] of the scales with the least expected error over all weights, each in its type's grid."""
    types = [block_type(kind) for kind in kinds]
    importance = [one.diagonal(dim1=-2, dim2=-1).reshape(-1) / (len(kind.levels) - 1 - kind.lowest) ** 2
                  for one, kind in zip(factors, types, strict=True)]
    return expected_scales(weights, moment, max(kind.sub for kind in types), GRID, importance).log()


def search_scales(weights: list[torch.Tensor], kinds: list[str], moment: torch.Tensor, factors: list[torch.Tensor],
                  divisors: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """(scales [in], how far they go) for weights [out, in] of `kinds` that read one input; 0 is no scaling at all.

    `factors` [blocks, size, size] are the blocks of each weight's G; rows are divided by `divisors` [out] for what comes
    after them. No layer may be left with a larger figure than ggml's rounding of the weight as it is.
    Raises StageError(non_finite) as kquant.quantize does.
    """
    def figures(scales: torch.Tensor, divisors: list[torch.Tensor]) -> list[float]:
        importance, found = (moment.diagonal() / scales**2).numpy(), []
        for weight, kind, factor, divisor in zip(weights, kinds, factors, divisors, strict=True):
            blocks = kquant.quantize((weight * scales / divisor[:, None]).numpy(), kind, importance, kernel="numba")
            stored = torch.from_numpy(dequantize(blocks, kind)) * divisor[:, None] / scales
            found.append(divergence(stored - weight, moment, factor))
        return found

    limits = figures(torch.ones_like(moment[0]), [torch.ones_like(one) for one in divisors])
    logs, best = direction(weights, kinds, moment, factors), (float("inf"), torch.ones_like(moment[0]), 0.0)
    for reach in REACHES:
        scales = (logs * reach).exp()
        scales = scales / (scales.max() * scales.min()).sqrt()
        found = figures(scales, divisors)
        within = reach == 0 or all(one <= limit for one, limit in zip(found, limits, strict=True))
        if within and sum(found) < best[0]:
            best = sum(found), scales, reach
    return best[1:]
