"""The error that a rounding leaves at a layer's outputs, row by row, and choosing rows by it."""

from dataclasses import replace

import numpy as np
import torch

from quantline.quantized.tensors import GroupedLinear, QuantizedTensor


def dequantize_like(linear: QuantizedTensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return the weight float32 [out, in] that a linear stands for, on the device of a tensor."""
    return torch.from_numpy(linear.dequantize()).to(tensor.device)


def row_errors(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return Δ H Δᵀ of each output: its mean squared error on the calibration text.

    Args:
        weight: float32 [out, in].
        rounded: What stands in its place, float32 [out, in]; Δ is the difference.
        hessian: H, float32 [in, in].

    Returns:
        float64 [out].
    """
    difference = rounded - weight
    return ((difference @ hessian) * difference).sum(1, dtype=torch.float64)


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return tr(Δ H Δᵀ), the sum of `row_errors`."""
    return float(row_errors(weight, rounded, hessian).sum())


def replace_rows(
    linear: GroupedLinear, replacement: GroupedLinear, replaced: torch.Tensor
) -> GroupedLinear:
    """Return a linear with the rows of another one where `replaced`, bool [out]."""
    mask = replaced.cpu().numpy()[:, None]
    return replace(
        linear,
        integers=np.where(mask, replacement.integers, linear.integers),
        scales=np.where(mask, replacement.scales, linear.scales),
        zeros=np.where(mask, replacement.zeros, linear.zeros),
    )


def choose_rows(
    weight: torch.Tensor, hessian: torch.Tensor, first: GroupedLinear, second: GroupedLinear
) -> GroupedLinear:
    """Combine two roundings: each row is the one with the smaller Δ H Δᵀ.

    Args:
        weight: float32 [out, in].
        hessian: H, float32 [in, in].
        first: A rounding; its row stays where both errors are equal.
        second: Another with the same bits, group size and symmetry.

    Returns:
        A linear with rows of both.
    """
    first_errors = row_errors(weight, dequantize_like(first, weight), hessian)
    second_errors = row_errors(weight, dequantize_like(second, weight), hessian)
    return replace_rows(first, second, second_errors < first_errors)
