"""SmoothQuant (Xiao et al. 2023, section 4): eight-bit integers for weights and activations.

Activations are rounded token by token. Inputs are divided by s_j = peak_j^a / w_j^(1-a) and weights
multiplied, with peak_j the largest input of channel j on the calibration text and w_j its largest
weight, so that no channel's magnitude coarsens the steps of all others. The paper takes a = 0.5;
here the a is searched that changes the layers' outputs least on a sample of the calibration's
tokens.
"""

from typing import Any, ClassVar

import torch

from quantline.methods.integer.int8 import round_to_int8
from quantline.methods.integer.output_error import dequantize_like
from quantline.methods.method import (
    InputScales,
    InputScalingMethod,
    LayerStatistics,
    Prepared,
    SharedInput,
    check_finite,
)
from quantline.methods.smoothquant import SmoothQuantRecipe
from quantline.quantized.tensors import GroupedLinear

LEVELS = 127.5  # steps from zero to a token's largest activation
SMALLEST = 1e-5  # of a weight, and of an input as a share of the largest


def round_inputs(inputs: torch.Tensor) -> torch.Tensor:
    """Return activations [tokens, in] as a server rounds them.

    They are symmetric, and each token has a step of its own.
    """
    step = (inputs.abs().amax(1, keepdim=True) / LEVELS).clamp(min=1e-20)
    return (inputs / step).round().clamp(-128, 127) * step


def output_change(
    weight: torch.Tensor, stored: torch.Tensor, inputs: torch.Tensor, scales: torch.Tensor
) -> float:
    """Return the mean squared change, summed over outputs, of what a layer makes of some inputs.

    Args:
        weight: The unquantized weight, float32 [out, in].
        stored: The rounded weight for inputs divided by `scales`, float32 [out, in].
        inputs: float32 [tokens, in].
        scales: float32 [in].
    """
    change = round_inputs(inputs / scales) @ stored.T - inputs @ weight.T
    return float((change**2).sum(1, dtype=torch.float64).mean())


def scaled_change(weight: torch.Tensor, inputs: torch.Tensor, scales: torch.Tensor) -> float:
    """Return `output_change` where the scaled weight is rounded to nearest."""
    stored = dequantize_like(round_to_int8(weight * scales), weight)
    return output_change(weight, stored, inputs, scales)


def search_scales(
    weights: list[torch.Tensor],
    peak: torch.Tensor,
    inputs: torch.Tensor,
    steps: int,
    smoothing: float | None,
) -> InputScales:
    """Search the scales of an input.

    Args:
        weights: Of the layers that read it, float32 [out, in] each.
        peak: The largest |x| per input, float32 [in].
        inputs: Of some tokens, float32 [tokens, in].
        steps: Exponents between 0 and 1 that are tried.
        smoothing: The exponent to take. None: the one that changes the outputs of all the layers
            least, and none of them more than no scaling does.

    Returns:
        The scales, with the exponent as their strength; that is None where no scaling is best.
    """
    largest_weights = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    largest_weights = largest_weights.clamp(min=SMALLEST)
    largest_inputs = peak.clamp(min=SMALLEST * float(peak.max()))

    def scales_of(exponent: float) -> torch.Tensor:
        scales = largest_inputs**exponent / largest_weights ** (1 - exponent)
        return scales / (scales.max() * scales.min()).sqrt()

    def changes(scales: torch.Tensor) -> list[float]:
        return [scaled_change(weight, inputs, scales) for weight in weights]

    if smoothing is not None:
        return InputScales(scales_of(smoothing), smoothing)
    best = InputScales(torch.ones_like(peak), None)
    limits = changes(best.scales)
    least = sum(limits)
    for step in range(steps + 1):
        exponent = step / steps
        scales = scales_of(exponent)
        layer_changes = changes(scales)
        within = all(change <= limit for change, limit in zip(layer_changes, limits, strict=True))
        if within and sum(layer_changes) < least:
            best = InputScales(scales, exponent)
            least = sum(layer_changes)
    return best


class SmoothQuant(InputScalingMethod[SmoothQuantRecipe, Prepared]):
    """Moves outliers of activations into the weights, then rounds to eight bits."""

    strength_key: ClassVar[str] = "exponent"

    def quantize(
        self, weight: torch.Tensor, statistics: LayerStatistics, prepared: Prepared | None
    ) -> GroupedLinear:
        """Quantize one scaled weight; see Method.quantize."""
        check_finite(statistics.layer, weight)
        return round_to_int8(weight)

    def quantize_baseline(self, layer: str, weight: torch.Tensor) -> GroupedLinear:
        """Round to eight bits without scaling."""
        return round_to_int8(weight)

    def search_scales(
        self, shared: SharedInput, divisors: list[torch.Tensor] | None
    ) -> InputScales:
        """Search the scales of an input; see InputScalingMethod.search_scales.

        Divisors change nothing: each row has one scale, which takes them in.
        """
        first = shared.statistics[0]
        recipe = self.recipe
        return search_scales(
            shared.weights, first.input_peak, first.input_sample, recipe.grid, recipe.smoothing
        )

    def remaining_error(
        self, weight: torch.Tensor, scales: torch.Tensor, statistics: LayerStatistics
    ) -> float:
        """Return how much the layer's outputs change on the sample."""
        return scaled_change(weight, statistics.input_sample, scales)

    def extra_report(
        self,
        weight: torch.Tensor,
        stored: torch.Tensor,
        scales: torch.Tensor,
        statistics: LayerStatistics,
    ) -> dict[str, Any]:
        """Return the change of the layer's outputs, and what it is without scaling."""
        inputs = statistics.input_sample
        unscaled = torch.ones_like(scales)
        return {
            "output_change": output_change(weight, stored, inputs, scales),
            "rtn_output_change": scaled_change(weight, inputs, unscaled),
        }
