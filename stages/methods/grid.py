"""The grid that a row's group is rounded to: scale and zero point, and rounding to the nearest point."""

from dataclasses import replace

import numpy as np
import torch

from stages.checkpoints.canonical import GroupedLinear
from stages.tracking import Failure, StageError

SMALLEST = 1e-10


def check_width(name: str, width: int, group_size: int) -> int:
    """The group size in weights (-1 is the whole row). Raises StageError(unsupported_width) if it does not divide."""
    size = width if group_size == -1 else group_size
    if width % size:
        fitting = [str(one) for one in (128, 64, 32) if width % one == 0] or ["-1 (the whole row)"]
        raise StageError(Failure.UNSUPPORTED_WIDTH, f"{name} has rows of {width} weights, which groups of {size} do not "
                                                    f"divide; group_size can be {', '.join(fitting)} here")
    return size


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Raise StageError(non_finite) if a weight is NaN or infinite."""
    if not torch.isfinite(weight).all():
        raise StageError(Failure.NON_FINITE, f"the weight of {name} is not finite")


def grid_between(low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of the grid from `low` (at most 0) to `high` (at least 0), tensors of one shape.

    The grid always holds 0. Scales are rounded to bfloat16, so that every container can carry them exactly, and the
    integers are chosen on the rounded scale.
    """
    if symmetric:
        half = 2 ** (bits - 1)
        scale = torch.maximum(-low / half, high / (half - 1)).clamp(min=SMALLEST)
        return scale.bfloat16().float(), torch.full_like(scale, half)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp(min=SMALLEST).bfloat16().float()
    return scale, (-low / scale).round().clamp(0, top)


def span_of(grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest weight of groups [..., group], and 0 if that lies outside: each [..., 1]."""
    return grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)


def round_to(grouped: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest integers of the grid."""
    return ((grouped / scale).round() + zero).clamp(0, 2**bits - 1)


def grid_of(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool,
            importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [out, groups] of a weight [out, in]; group_size must divide in.

    Without `importance` the grid spans the group (min-max). With it, a positive weight per input [in] such as diag(H),
    the span is shrunk in steps to the one with the least weighted squared error.
    """
    grouped = weight.reshape(len(weight), -1, group_size)
    low, high = span_of(grouped)
    best_scale, best_zero = grid_between(low, high, bits, symmetric)
    if importance is None:
        return best_scale[..., 0], best_zero[..., 0]
    weights = importance.reshape(1, -1, group_size)

    def error(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        rounded = (round_to(grouped, scale, zero, bits) - zero) * scale
        return ((rounded - grouped) ** 2 * weights).sum(-1, keepdim=True)

    least = error(best_scale, best_zero)
    for step in range(1, 21):
        share = 1 - 0.02 * step
        scale, zero = grid_between(low * share, high * share, bits, symmetric)
        found = error(scale, zero)
        better = found < least
        least = torch.where(better, found, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale[..., 0], best_zero[..., 0]


def canonical(integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, group_size: int,
              symmetric: bool) -> GroupedLinear:
    """The canonical layout of integers [out, in] on a grid [out, groups]."""
    integers, zeros = (one.to(torch.uint8).cpu().numpy() for one in (integers, zeros))
    return GroupedLinear(integers, scales.contiguous().cpu().numpy(), zeros, bits, group_size, symmetric)


def row_errors(weight: torch.Tensor, rounded: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Δ H Δᵀ of each output, float64 [out]: its mean squared error on the calibration text."""
    difference = rounded - weight
    return ((difference @ moment) * difference).sum(1, dtype=torch.float64)


def choose_rows(weight: torch.Tensor, moment: torch.Tensor, one: GroupedLinear, other: GroupedLinear) -> GroupedLinear:
    """The rows of two roundings of a weight [out, in] that leave the smaller Δ H Δᵀ each."""
    first, second = (row_errors(weight, torch.from_numpy(linear.dequantize()).to(weight.device), moment) for linear in (one, other))
    better = (second < first).cpu().numpy()[:, None]
    return replace(one, **{part: np.where(better, getattr(other, part), values) for part, values in one.parts().items()})


def output_error(weight: torch.Tensor, rounded: torch.Tensor, moment: torch.Tensor) -> float:
    """tr(ΔW H ΔWᵀ): the mean squared error of the layer's output on the calibration text, summed over outputs."""
    return float(row_errors(weight, rounded, moment).sum())
