"""What is told of each rounded layer, and that none is worse than the naive rounding."""

import numpy as np
import torch

from stages.checkpoints.canonical import FloatLinear, GroupedLinear
from stages.methods import fp8, rtn
from stages.methods.curvature import divergence
from stages.methods.ggml_blocks import blocks_values, grid_like
from stages.methods.grid import output_error
from stages.methods.mixes import FLOATS
from stages.recipes import PLAIN
from stages.recipes.work import Work
from stages.tracking import Failure, StageError

CHUNK_VALUES = 1 << 22  # weights looked at at once, so that a large matrix needs little memory
ROUNDING = 1e-6  # share by which two float32 sums of the same errors may differ


def layer_report(name: str, linear: GroupedLinear | FloatLinear, weight: torch.Tensor, stored: torch.Tensor,
                 moment: torch.Tensor, factors: torch.Tensor | None, seen: dict, damping: float | None) -> dict:
    """What is told of a layer: the tokens that it has `seen`, and the error of the weight as it is `stored` [out, in], held
    against round-to-nearest's.

    The error is tr(Δ H Δᵀ), and with the output factor there is the divergence tr(G Δ H Δᵀ) too.
    """
    plain = (fp8.quantize(weight) if isinstance(linear, FloatLinear) else
             rtn.quantize(weight, linear.bits, linear.group_size, linear.symmetric))
    naive = dense(plain, weight)
    report = {**linear.about(), "shape": list(weight.shape), **seen, "damping": damping,
              "error": output_error(weight, stored, moment), "rtn_error": output_error(weight, naive, moment)}
    if factors is not None:
        report |= {"divergence": divergence(stored - weight, moment, factors),
                   "rtn_divergence": divergence(naive - weight, moment, factors)}
    return report


def blocks_report(work: Work, module: str, weight: np.ndarray, kind: str, data: np.ndarray) -> dict:
    """What is told of a weight [out, in] in ggml's blocks: the error Σ Δ² diag(H), which is what an importance matrix
    lowers, held against that of round-to-nearest with as many bits and groups as large (None if the type is no grid).

    Nothing is told of a tensor that has no calibration, as the embedding, or whose type is a plain float.
    """
    if module not in work.moments.layers or kind in FLOATS:
        return {}
    squares, rtn_grid = work.moments.diagonal(module), grid_like(kind)
    error, naive = 0.0, 0.0
    for start in range(0, len(weight), step := max(1, CHUNK_VALUES // weight.shape[1])):
        rows = weight[start:start + step].astype(np.float32)
        error += float(((blocks_values(data[start:start + step], kind) - rows) ** 2 @ squares).sum(dtype=np.float64))
        if rtn_grid:
            plain = rtn.quantize(torch.from_numpy(rows), *rtn_grid).dequantize()
            naive += float(((plain - rows) ** 2 @ squares).sum(dtype=np.float64))
    return {"diagonal_error": error, "rtn_diagonal_error": naive if rtn_grid else None}


def check_gain(name: str, report: dict, plain: str = "rtn") -> None:
    """Raise StageError(worse_than_round_to_nearest) unless a layer's figure is at most that of the plain rounding; NaN
    is not.

    The figure is what the recipe minimizes. What lowers the divergence may well raise the error of outputs that the
    model's answer hardly depends on.
    """
    what, (whose, other) = next(one for one in ("output_change", "divergence", "error") if one in report), PLAIN[plain]
    if not report[what] <= report[f"{plain}_{what}"] * (1 + ROUNDING):
        raise StageError(Failure.WORSE_THAN_ROUND_TO_NEAREST, f"{name} has the {what} {report[what]:.4g}, more than "
                         f"{whose} {report[f'{plain}_{what}']:.4g}; calibrate on more text, or use {other}")


def dense(linear: GroupedLinear | FloatLinear, like: torch.Tensor) -> torch.Tensor:
    """The weight that a rounded layer stands for, on the device of another."""
    return torch.from_numpy(linear.dequantize()).to(like.device)
