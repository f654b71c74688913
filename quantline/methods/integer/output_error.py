"""The error that a rounding leaves at a layer's outputs, row by row, and choosing rows by it."""

from dataclasses import replace

import numba
import numpy as np
import torch

from quantline.methods.threads import run_over_rows
from quantline.quantized.tensors import GroupedLinear, QuantizedTensor


def dequantize_like(linear: QuantizedTensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return the weight float32 [out, in] that a linear stands for, on the device of a tensor."""
    return torch.from_numpy(linear.dequantize()).to(tensor.device)


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _row_dots(first: np.ndarray, second: np.ndarray, dots: np.ndarray) -> None:
    """Write `row_dots` of some rows into dots [rows]."""
    for row in range(len(dots)):
        total = np.float64(0)
        for j in range(first.shape[1]):
            total += np.float64(first[row, j]) * np.float64(second[row, j])
        dots[row] = total


def row_dots(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the dot product of each row of two matrices float32 [rows, n], float64 [rows].

    On the CPU rows run in threads through a compiled kernel.
    """
    if first.device.type != "cpu":
        return (first * second).sum(1, dtype=torch.float64)
    dots = torch.empty(len(first), dtype=torch.float64)
    first = first.contiguous()
    second = second.contiguous()

    def run(rows: slice) -> None:
        _row_dots(first[rows].numpy(), second[rows].numpy(), dots[rows].numpy())

    run_over_rows(len(first), run)
    return dots


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
    return row_dots(difference @ hessian, difference)


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
