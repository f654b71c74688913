"""Eight-bit floats (e4m3) with one scale per output channel; the server rounds activations to the same, token by token.

The format has three bits of mantissa and reaches 448 (Micikevicius et al. 2022, section 3).
"""

import ml_dtypes
import numpy as np
import torch

from quantline.quantized.store import FloatLinear
from quantline.methods.integer.rtn_numpy import SMALLEST

LARGEST = 448.0


def quantize(weight: torch.Tensor) -> FloatLinear:
    """A weight [out, in], each row spanning the format's range."""
    scales = (weight.abs().amax(1, keepdim=True) / LARGEST).clamp(min=SMALLEST).bfloat16().float().cpu().numpy()
    # A scale that bfloat16 rounded down would take the largest weight out of range, which this format turns into NaN.
    values = np.clip(weight.cpu().numpy() / scales, -LARGEST, LARGEST)
    return FloatLinear(values.astype(ml_dtypes.float8_e4m3fn), scales)
