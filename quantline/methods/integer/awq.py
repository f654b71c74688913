"""AWQ (Lin et al. 2023, section 3.2): scale up the inputs that matter before rounding.

The authors search one exponent by rounding again and again. Here the error that rounding is
expected to leave is minimized (quantline/methods/integer/awq_scales.py), which needs the
calibration's moments alone, and rounding only says how far to go towards that. Dividing the input
by the scales is the business of whatever comes before; see quantline/recipes/input_scaling.py.
"""

from typing import ClassVar

import torch

from quantline.methods.awq import AwqRecipe
from quantline.methods.integer import gptq
from quantline.methods.integer.awq_clip import quantize_clipped
from quantline.methods.integer.awq_scales import search_expected_scales
from quantline.methods.integer.gptq import GptqFactor
from quantline.methods.integer.grid import Grid, grid_for
from quantline.methods.integer.grouped_method import GroupedMethod
from quantline.methods.integer.output_error import dequantize_like, row_errors
from quantline.methods.integer.round_to_nearest import round_to_nearest
from quantline.methods.method import (
    InputScales,
    InputScalingMethod,
    LayerStatistics,
    SharedInput,
)
from quantline.quantized.tensors import GroupedLinear

# Shares of the way to the scales with the least expected error, in their logarithms.
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Of a layer, whose errors tell the strengths apart. All of them would cost more than the rounding.
JUDGED_ROWS = 512


def scaled_error(
    weight: torch.Tensor,
    scales: torch.Tensor,
    hessian: torch.Tensor,
    output_importance: torch.Tensor,
    grid: Grid,
    divisor: torch.Tensor | None = None,
) -> float:
    """Return Σ importance · Δ H Δᵀ where a scaled weight is rounded to nearest.

    Args:
        weight: float32 [out, in].
        scales: Multiply the inputs' columns, float32 [in].
        hessian: H, float32 [in, in].
        output_importance: float32 [out].
        grid: Its group size divides `in`.
        divisor: Scales of the next layer's input, which divide the rows, float32 [out]; None
            where there are none.
    """
    scaled = weight * scales
    if divisor is not None:
        scaled = scaled / divisor[:, None]
    stored = dequantize_like(round_to_nearest(scaled, grid), weight)
    if divisor is not None:
        stored = stored * divisor[:, None]
    errors = row_errors(weight, stored / scales, hessian)
    return float(errors @ output_importance.double())


def search_scales(
    weights: list[torch.Tensor],
    hessian: torch.Tensor,
    grid: Grid,
    steps: int,
    divisors: list[torch.Tensor] | None = None,
    importance: list[torch.Tensor] | None = None,
) -> InputScales | None:
    """Search the scales of an input.

    On the way from no scaling to the scales with the least expected error, those are taken where
    rounding to nearest leaves the least Σ importance · Δ H Δᵀ over the outputs, of which
    JUDGED_ROWS of a layer are looked at, evenly spread.

    Args:
        weights: Of the layers that read the input, float32 [out, in] each.
        hessian: H, float32 [in, in].
        grid: Its group size divides `in`.
        steps: Exponents that the search of the least expected error starts from.
        divisors: Scales of the next layer's input, folded into these rows as divisors, float32
            [out] each. None: the rows are not divided.
        importance: Of the outputs, float32 [out] each. None: 1.

    Returns:
        The scales with their strength, from 0 for none to 1 for the whole way. None if not even
        strength 0 leaves every layer at most the error that rounding to nearest gives it.
    """
    ones = [torch.ones_like(weight[:, 0]) for weight in weights]
    if divisors is None:
        divisors = ones
    if importance is None:
        importance = ones
    judged = [slice(None, None, -(-len(weight) // JUDGED_ROWS)) for weight in weights]

    def errors(scales: torch.Tensor, divisors: list[torch.Tensor]) -> list[float]:
        of_layers = zip(weights, importance, divisors, judged, strict=True)
        return [
            scaled_error(weight[rows], scales, hessian, outputs[rows], grid, divisor[rows])
            for weight, outputs, divisor, rows in of_layers
        ]

    direction = search_expected_scales(weights, hessian, grid.group_size, steps, importance).log()
    limits = errors(torch.ones_like(direction), ones)
    best: InputScales | None = None
    least = float("inf")
    for strength in STRENGTHS:
        scales = (direction * strength).exp()
        scales = scales / (scales.max() * scales.min()).sqrt()
        layer_errors = errors(scales, divisors)
        within = all(error <= limit for error, limit in zip(layer_errors, limits, strict=True))
        if within and (best is None or sum(layer_errors) < least):
            best = InputScales(scales, strength)
            least = sum(layer_errors)
    return best


class Awq(GroupedMethod[AwqRecipe, GptqFactor], InputScalingMethod[AwqRecipe, GptqFactor]):
    """Scales inputs, then rounds to nearest on clipped ranges or by GPTQ."""

    strength_key: ClassVar[str] = "reach"

    def prepare(self, hessian: torch.Tensor) -> GptqFactor | None:
        """Factorize the Hessian if GPTQ rounds the scaled weights."""
        return gptq.factorize(hessian) if self.recipe.rounding == "gptq" else None

    def round(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        grid: Grid,
        prepared: GptqFactor | None,
    ) -> GroupedLinear:
        """Round a scaled weight as the recipe says."""
        weighted = self.recipe.scales == "weighted"
        if prepared is not None:
            return gptq.quantize(weight, hessian, grid, prepared, weighted)
        if weighted:
            return quantize_clipped(weight, hessian, grid)
        return round_to_nearest(weight, grid)

    def improve(
        self,
        linear: GroupedLinear,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        prepared: GptqFactor | None,
    ) -> GroupedLinear:
        """Lower the error Δ H Δᵀ of each row by coordinate descent, after GPTQ."""
        if prepared is None:
            return linear
        return gptq.improve(linear, weight, hessian, prepared)

    def _grid(self, statistics: LayerStatistics) -> Grid:
        return grid_for(statistics.layer, self.recipe, len(statistics.hessian))

    def search_scales(
        self, shared: SharedInput, divisors: list[torch.Tensor] | None
    ) -> InputScales | None:
        """Search the scales of an input; see InputScalingMethod.search_scales."""
        first = shared.statistics[0]
        grid = self._grid(first)
        importance = [statistics.output_importance for statistics in shared.statistics]
        steps = self.recipe.grid
        return search_scales(shared.weights, first.hessian, grid, steps, divisors, importance)

    def remaining_error(
        self, weight: torch.Tensor, scales: torch.Tensor, statistics: LayerStatistics
    ) -> float:
        """Return Σ importance · Δ H Δᵀ where the scaled weight is rounded to nearest."""
        importance = statistics.output_importance
        return scaled_error(weight, scales, statistics.hessian, importance, self._grid(statistics))
