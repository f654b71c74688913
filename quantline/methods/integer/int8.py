"""Eight bits per weight, one symmetric scale per output channel."""

import torch

from quantline.methods.int8 import Int8Recipe
from quantline.methods.integer.grid import Grid
from quantline.methods.integer.round_to_nearest import round_to_nearest
from quantline.methods.method import LayerStatistics, Method, Prepared, check_finite
from quantline.quantized.tensors import GroupedLinear


def round_to_int8(weight: torch.Tensor) -> GroupedLinear:
    """Round a weight float32 [out, in] to integers around 128."""
    grid = Grid(bits=8, group_size=weight.shape[1], symmetric=True)
    return round_to_nearest(weight, grid)


class Int8(Method[Int8Recipe, Prepared]):
    """Rounds to eight bits."""

    def quantize(
        self, weight: torch.Tensor, statistics: LayerStatistics, prepared: Prepared | None
    ) -> GroupedLinear:
        """Quantize one linear weight; see Method.quantize."""
        check_finite(statistics.layer, weight)
        return round_to_int8(weight)

    def quantize_baseline(self, layer: str, weight: torch.Tensor) -> GroupedLinear:
        """Round to eight bits, which the method does anyway."""
        return round_to_int8(weight)
