"""Where tensors are worked on: the GPU if there is one (written for CUDA, and not tried on such hardware yet)."""

from functools import cache

import torch


@cache
def device() -> torch.device:
    """One device for calibration and quantization."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
