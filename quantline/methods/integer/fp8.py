"""Eight-bit floats (e4m3) with one scale per output channel.

The server rounds activations to the same, token by token. The format has three bits of mantissa and
reaches 448 (Micikevicius et al. 2022, section 3).
"""

import ml_dtypes
import numpy as np
import torch

from quantline.methods.fp8 import Fp8Recipe
from quantline.methods.integer.rtn_numpy import SMALLEST_SCALE
from quantline.methods.method import LayerStatistics, Method, Prepared, check_finite
from quantline.quantized.tensors import FloatLinear

LARGEST = 448.0


def round_to_float8(weight: torch.Tensor) -> FloatLinear:
    """Round a weight float32 [out, in] so that each row spans the format's range."""
    scales = (weight.abs().amax(1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
    stored_scales = scales.bfloat16().float().cpu().numpy()
    # A scale that bfloat16 rounded down would take the largest weight out of range, which this
    # format turns into NaN.
    values = np.clip(weight.cpu().numpy() / stored_scales, -LARGEST, LARGEST)
    return FloatLinear(values.astype(ml_dtypes.float8_e4m3fn), stored_scales)


class Fp8(Method[Fp8Recipe, Prepared]):
    """Rounds to eight-bit floats."""

    def quantize(
        self, weight: torch.Tensor, statistics: LayerStatistics, prepared: Prepared | None
    ) -> FloatLinear:
        """Quantize one linear weight; see Method.quantize."""
        check_finite(statistics.layer, weight)
        return round_to_float8(weight)

    def quantize_baseline(self, layer: str, weight: torch.Tensor) -> FloatLinear:
        """Round to eight-bit floats, which the method does anyway."""
        return round_to_float8(weight)
