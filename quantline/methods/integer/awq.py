"""AWQ (Lin et al. 2023, section 3.2): scale up the inputs that matter. Clipping and rounding are in quantline/methods/integer/awq_clip.py.

The authors search one exponent by rounding again and again. Here the error that rounding is expected to leave is
minimized (quantline/methods/integer/awq_scales.py), which needs the calibration's moments alone, and rounding only says how far to go
towards that. Dividing the input by the scales is the business of whatever comes before; see quantline/recipes/input_scaling.py.
"""

import torch

from quantline.methods.integer import rtn
from quantline.methods.integer.awq_scales import expected_scales
from quantline.methods.integer.grid import row_errors


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

    direction = expected_scales(weights, moment, group_size, grid, importance).log()
    limits, best = errors(torch.ones_like(direction), plain), None
    for reach in (0.0, 0.25, 0.5, 0.75, 1.0):
        scales = (direction * reach).exp()
        scales = scales / (scales.max() * scales.min()).sqrt()
        found = errors(scales, divisors)
        if all(error <= limit for error, limit in zip(found, limits, strict=True)) and (best is None or sum(found) < best[0]):
            best = (sum(found), scales, reach)
    return best and best[1:]
