"""The driver for methods that quantize each linear layer of a block on its own."""

from functools import partial
from itertools import groupby
from typing import Any

import torch

from quantline.errors import StageError
from quantline.methods.integer.output_error import dequantize_like
from quantline.methods.method import Method, Prepared, check_size
from quantline.model.same_bits import same_bits
from quantline.quantized.tensors import QuantizedTensor
from quantline.recipes.context import QuantizationContext
from quantline.recipes.fallback import attempt, say_how
from quantline.recipes.layer_report import LayerJudge, check_gain


@same_bits()
def quantize_block(ctx: QuantizationContext, layer: int) -> dict[str, Any]:
    """Quantize the linear layers of a block and give them to the writer.

    Args:
        ctx: What to quantize, and how.
        layer: The number of the block.

    Returns:
        {layers: the report of each, transforms: none}.

    Raises:
        StageError: As the method and the calibration do, but for what concerns one layer alone
            (quantline/recipes/fallback.py).
    """
    reports: dict[str, Any] = {}
    names = ctx.arch.linears_of(layer)
    for _, group in groupby(names, ctx.calibration.input_key):
        linears = list(group)
        hessian = ctx.hessian(linears[0])
        method = ctx.method_of(linears[0])
        prepared, failure = attempt(partial(method.prepare, hessian))
        for name in linears:
            reports[name] = _quantize_linear(ctx, name, hessian, prepared, failure)
    return {"layers": reports, "transforms": []}


def _quantize_linear(
    ctx: QuantizationContext,
    name: str,
    hessian: torch.Tensor,
    prepared: Prepared | None,
    failure: StageError | None,
) -> dict[str, Any]:
    """Quantize one linear layer, give it to the writer, and return its report.

    It is rounded to nearest if the method could not prepare, or if that is better.
    """
    method: Method[Any, Any] = ctx.method_of(name)
    weight = ctx.weight(name)
    statistics = ctx.statistics(name, hessian)
    check_size(name, weight)
    baseline = method.quantize_baseline(name, weight)
    judge = LayerJudge(weight, dequantize_like(baseline, weight), statistics)

    def report_of(linear: QuantizedTensor) -> dict[str, Any]:
        stored = dequantize_like(linear, weight)
        return judge.report(linear, stored, ctx.calibration.coverage(name), prepared)

    kept = ctx.source_codes.grouped(name, baseline)
    if kept is not None:
        # Rounding again what these stand for could only lose.
        ctx.writer.add_linear(name, kept)
        return report_of(kept) | {"codes": "the source's own"}
    linear: QuantizedTensor = baseline
    report = report_of(linear)
    if failure is None:
        own = method.quantize(weight, statistics, prepared)
        own_report = report_of(own)
        _, failure = attempt(lambda: check_gain(name, own_report, ctx.recipe.baseline))
        if failure is None:
            linear, report = own, own_report
    ctx.writer.add_linear(name, linear)
    say_how(ctx, name, report, failure)
    return report
