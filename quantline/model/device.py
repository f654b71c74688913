"""Where tensors are worked on: the GPU if there is one. How far that agrees with the CPU is in benchmarks/README.md."""

from functools import cache

import torch


@cache
def device() -> torch.device:
    """One device for calibration and quantization."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
