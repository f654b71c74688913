"""Eight bits per weight, one symmetric scale per output channel."""

import torch

from stages.checkpoints.canonical import GroupedLinear
from stages.methods import rtn


def quantize(weight: torch.Tensor) -> GroupedLinear:
    """A weight [out, in] as integers around 128."""
    return rtn.quantize(weight, bits=8, group_size=weight.shape[1], symmetric=True)
