"""The grid that a row's group is rounded to: scale and zero point, and rounding to the nearest point."""

from dataclasses import replace

import numba
import numpy as np
import torch

from quantline.quantized.store import GroupedLinear
from quantline.methods.integer.rtn_numpy import SMALLEST
from quantline.methods.threads import over_rows
from quantline.errors import Failure, StageError

SHRUNK = [1 - 0.02 * step for step in range(21)]  # shares of a group's span


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


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def least_span(weights, stands, pull, diagonal, scales, zeros, top):
    """Which of the grids scales, zeros [spans] rounds a group's weights [group] with the least Σ (2 · pull + diagonal · m) · m.

    m is the move from what `stands` there to the rounded weight. The first of equals.
    """
    least, best = np.float32(np.inf), 0
    for span in range(len(scales)):
        scale, zero, cost = scales[span], zeros[span], np.float32(0)
        for j in range(len(weights)):
            integer = min(max(np.rint(weights[j] / scale) + zero, np.float32(0)), top)
            move = (integer - zero) * scale - stands[j]
            cost += (2 * pull[j] + diagonal[j] * move) * move
        if cost < least:
            least, best = cost, span
    return best


@numba.njit(nogil=True, cache=True, fastmath=False)
def _least_spans(grouped, importance, scales, zeros, top, found):
    """`least_span` of groups [rows, groups, group] by their weighted squared error, into found [rows, groups]."""
    nothing = np.zeros(grouped.shape[2], np.float32)
    for row in range(len(grouped)):
        for group in range(grouped.shape[1]):
            one = grouped[row, group]
            found[row, group] = least_span(one, one, nothing, importance[group], scales[row, group], zeros[row, group], top)


def least_spans(grouped: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor,
                top: int) -> torch.Tensor:
    """The number [rows, groups] of the grid of scales, zeros [rows, groups, spans] with the least squared error of groups
    [rows, groups, group], weighted by importance [groups, group]. On the CPU rows run in threads through a compiled kernel.
    """
    if grouped.device.type != "cpu":
        return least_spans_at_once(grouped, importance, scales, zeros, top)
    found = torch.empty(grouped.shape[:2], dtype=torch.int64)
    grouped, importance, scales, zeros = (one.contiguous() for one in (grouped, importance, scales, zeros))

    def run(rows: slice) -> None:
        _least_spans(grouped[rows].numpy(), importance.numpy(), scales[rows].numpy(), zeros[rows].numpy(), np.float32(top),
                     found[rows].numpy())

    over_rows(len(grouped), run)
    return found


def least_spans_at_once(grouped: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor,
                        top: int) -> torch.Tensor:
    """`least_spans` with all groups at once, as a GPU likes it."""
    errors = []
    for scale, zero in zip(scales.split(1, -1), zeros.split(1, -1), strict=True):
        integers = ((grouped / scale).round() + zero).clamp(0, top)
        errors.append((((integers - zero) * scale - grouped) ** 2 * importance).sum(-1))
    return torch.stack(errors).argmin(0)


def grid_of(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool,
            importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [out, groups] of a weight [out, in]; group_size must divide in.

    Without `importance` the grid spans the group (min-max). With it, a positive weight per input [in] such as diag(H),
    the span is shrunk in steps to the one with the least weighted squared error.
    """
    grouped = weight.reshape(len(weight), -1, group_size)
    low, high = span_of(grouped)
    if importance is None:
        scales, zeros = grid_between(low, high, bits, symmetric)
        return scales[..., 0], zeros[..., 0]
    shares = torch.tensor(SHRUNK, device=weight.device)
    scales, zeros = grid_between(low * shares, high * shares, bits, symmetric)
    best = least_spans(grouped, importance.reshape(-1, group_size), scales, zeros, 2**bits - 1)[..., None]
    return scales.gather(-1, best)[..., 0], zeros.gather(-1, best)[..., 0]


def canonical(integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, group_size: int,
              symmetric: bool) -> GroupedLinear:
    """The canonical layout of integers [out, in] on a grid [out, groups]."""
    integers, zeros = (one.to(torch.uint8).cpu().numpy() for one in (integers, zeros))
    return GroupedLinear(integers, scales.contiguous().cpu().numpy(), zeros, bits, group_size, symmetric)


def row_errors(weight: torch.Tensor, rounded: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Δ H Δᵀ of each output, float64 [out]: its mean squared error on the calibration text."""
    difference = rounded - weight
    return ((difference @ moment) * difference).sum(1, dtype=torch.float64)


def rows_of(one: GroupedLinear, other: GroupedLinear, better: torch.Tensor) -> GroupedLinear:
    """The rows [out] of another rounding where it is `better`, else those of the one."""
    mask = better.cpu().numpy()[:, None]
    return replace(one, **{part: np.where(mask, getattr(other, part), values) for part, values in one.parts().items()})


def choose_rows(weight: torch.Tensor, moment: torch.Tensor, one: GroupedLinear, other: GroupedLinear) -> GroupedLinear:
    """The rows of two roundings of a weight [out, in] that leave the smaller Δ H Δᵀ each."""
    first, second = (row_errors(weight, torch.from_numpy(linear.dequantize()).to(weight.device), moment) for linear in (one, other))
    return rows_of(one, other, second < first)


def output_error(weight: torch.Tensor, rounded: torch.Tensor, moment: torch.Tensor) -> float:
    """tr(ΔW H ΔWᵀ): the mean squared error of the layer's output on the calibration text, summed over outputs."""
    return float(row_errors(weight, rounded, moment).sum())
