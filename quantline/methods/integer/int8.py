"""Eight bits per weight, one symmetric scale per output channel."""

import torch

from quantline.quantized.store import GroupedLinear
from quantline.methods.integer import rtn


def quantize(weight: torch.Tensor) -> GroupedLinear:
    """A weight [out, in] as integers around 128."""
    return rtn.quantize(weight, bits=8, group_size=weight.shape[1], symmetric=True)
