"""Random linear layers, with the second moments of their inputs and of their output gradients."""

import torch

from quantline.methods.integer.output_error import dequantize_like, output_error, row_errors
from quantline.quantized.tensors import GroupedLinear


def uneven_layer(seed: int, rows: int = 24, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W [rows, width] and H [width, width] of correlated inputs of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-1.5, 0.5, width)[:, None]
    mixing = torch.randn(width, width, generator=generator) * sizes
    inputs = torch.randn(512, width, generator=generator) @ mixing.T
    weight = torch.randn(rows, width, generator=generator)
    return weight, inputs.T @ inputs / len(inputs)


def correlated_moments(size: int, generator: torch.Generator) -> torch.Tensor:
    """Return second moments [size, size], positive definite and correlated."""
    samples = torch.randn(4 * size, size, generator=generator)
    mixed = samples @ torch.randn(size, size, generator=generator)
    return mixed.T @ mixed / (4 * size)


def errors_of(linear: GroupedLinear, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return Δ H Δᵀ of each row of a rounded weight, float64 [out]."""
    return row_errors(weight, dequantize_like(linear, weight), hessian)


def error_of(linear: GroupedLinear, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return tr(Δ H Δᵀ) of a rounded weight."""
    return output_error(weight, dequantize_like(linear, weight), hessian)
