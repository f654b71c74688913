"""What is told of each rounded layer, and that none is worse than the naive rounding."""

import torch

from quantline.quantized.store import FloatLinear, GroupedLinear
from quantline.methods.integer import fp8, rtn
from quantline.methods.integer.curvature import divergence
from quantline.methods.integer.grid import output_error
from quantline.recipes.dispatch import PLAIN
from quantline.errors import Failure, StageError

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
