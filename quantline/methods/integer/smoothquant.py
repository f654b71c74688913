"""SmoothQuant (Xiao et al. 2023, section 4): eight-bit integers for weights and, token by token, for activations.

Inputs are divided by s_j = peak_j^a / w_j^(1-a) and weights multiplied, with peak_j the largest input of channel j on the
calibration text and w_j its largest weight, so that no channel's size coarsens the steps of all others. The paper takes
a = 0.5; here the a is searched that changes the layers' outputs least on a sample of the calibration's tokens.
"""

import torch

from quantline.methods.integer import int8

LEVELS = 127.5  # steps from zero to a token's largest activation
SMALLEST = 1e-5


def round_inputs(rows: torch.Tensor) -> torch.Tensor:
    """Activations [tokens, in] as a server rounds them: symmetric, each token with a step of its own."""
    step = (rows.abs().amax(1, keepdim=True) / LEVELS).clamp(min=1e-20)
    return (rows / step).round().clamp(-128, 127) * step


def output_change(weight: torch.Tensor, stored: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor) -> float:
    """Mean squared change, summed over outputs, of what a layer makes of `rows` [tokens, in].

    `stored` [out, in] is the rounded weight that belongs to inputs divided by `scales` [in].
    """
    change = round_inputs(rows / scales) @ stored.T - rows @ weight.T
    return float((change**2).sum(1, dtype=torch.float64).mean())


def search_scales(weights: list[torch.Tensor], peak: torch.Tensor, rows: torch.Tensor, grid: int,
                  smoothing: float | None) -> tuple[torch.Tensor, float | None]:
    """(scales [in], exponent a) for weights [out, in] that read one input; a is None where no scaling is best.

    With `smoothing` that exponent is taken; otherwise the one that changes the outputs of all the layers least, and none
    of them more than no scaling does.
    """
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp(min=SMALLEST)
    reach = peak.clamp(min=SMALLEST * float(peak.max()))

    def scales_of(exponent: float) -> torch.Tensor:
        scales = reach**exponent / largest ** (1 - exponent)
        return scales / (scales.max() * scales.min()).sqrt()

    def changes(scales: torch.Tensor) -> list[float]:
        stored = (torch.from_numpy(int8.quantize(weight * scales).dequantize()).to(weight.device) for weight in weights)
        return [output_change(weight, one, rows, scales) for weight, one in zip(weights, stored, strict=True)]

    if smoothing is not None:
        return scales_of(smoothing), smoothing
    scales, exponent = torch.ones_like(peak), None
    limits = least = changes(scales)
    for step in range(grid + 1):
        candidate = scales_of(step / grid)
        found = changes(candidate)
        if sum(found) < sum(least) and all(one <= limit for one, limit in zip(found, limits, strict=True)):
            scales, exponent, least = candidate, step / grid, found
    return scales, exponent
