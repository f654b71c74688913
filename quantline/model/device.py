"""Where tensors are computed on: the GPU if there is one (benchmarks/README.md compares both)."""

from functools import cache

import torch


@cache
def device() -> torch.device:
    """Return the one device for calibration and quantization."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
