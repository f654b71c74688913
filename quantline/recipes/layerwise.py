"""The driver for methods that quantize each linear layer of a block on its own."""

from itertools import groupby
from typing import Any

import torch

from quantline.methods.integer.output_error import dequantize_like
from quantline.methods.method import Method, Prepared
from quantline.recipes.context import QuantizationContext
from quantline.recipes.layer_report import check_gain, layer_report


def quantize_block(ctx: QuantizationContext, layer: int) -> dict[str, Any]:
    """Quantize the linear layers of a block and give them to the writer.

    Args:
        ctx: What to quantize, and how.
        layer: The number of the block.

    Returns:
        {layers: the report of each, transforms: none}.

    Raises:
        StageError: worse_than_round_to_nearest; as the method and the calibration do.
    """
    reports: dict[str, Any] = {}
    names = ctx.arch.linears_of(layer)
    for _, group in groupby(names, ctx.calibration.input_key):
        linears = list(group)
        hessian = ctx.hessian(linears[0])
        prepared = ctx.method_of(linears[0]).prepare(hessian)
        for name in linears:
            reports[name] = _quantize_linear(ctx, name, hessian, prepared)
    return {"layers": reports, "transforms": []}


def _quantize_linear(
    ctx: QuantizationContext, name: str, hessian: torch.Tensor, prepared: Prepared | None
) -> dict[str, Any]:
    """Quantize one linear layer, give it to the writer, and return its report."""
    method: Method[Any, Any] = ctx.method_of(name)
    weight = ctx.weight(name)
    statistics = ctx.statistics(name, hessian)
    linear = method.quantize(weight, statistics, prepared)
    ctx.writer.add_linear(name, linear)
    report = layer_report(
        linear,
        weight,
        dequantize_like(linear, weight),
        dequantize_like(method.quantize_baseline(name, weight), weight),
        statistics,
        ctx.calibration.coverage(name),
        prepared,
    )
    check_gain(name, report, ctx.recipe.baseline)
    return report
