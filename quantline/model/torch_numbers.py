"""Stored numbers as a model computes with them: torch tensors, floats in float32."""

import ml_dtypes
import numpy as np
import torch


def computed_with(values: np.ndarray) -> torch.Tensor:
    """Return an array as a tensor on the CPU; floats in float32, whole numbers as they are.

    float32 holds every bfloat16 and float16 exactly.
    """
    if values.dtype.kind in "iub":
        return torch.from_numpy(values)
    if values.dtype != ml_dtypes.bfloat16:
        return torch.from_numpy(values.astype(np.float32))
    # torch converts three times as fast as numpy, which in turn takes memory in larger pages.
    made = torch.from_numpy(np.empty(values.shape, np.float32))
    return made.copy_(torch.from_numpy(values.view(np.int16)).view(torch.bfloat16))
