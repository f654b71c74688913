"""The driver for methods that scale the inputs of layers before they round them.

Inputs are divided by the scales and weights multiplied, so that the function stays the same. What
divides an input is what comes before it: a norm, or a linear layer of the same block (up before
down), whose rows are divided.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from quantline.errors import Failure, StageError
from quantline.methods.integer.output_error import dequantize_like
from quantline.methods.method import (
    InputScalingMethod,
    Prepared,
    SharedInput,
    check_size,
    scale_hessian,
)
from quantline.model.family import InputGroup
from quantline.model.same_bits import same_bits
from quantline.model.tensor_source import TensorSource
from quantline.quantized.tensors import QuantizedTensor
from quantline.recipes.context import QuantizationContext
from quantline.recipes.fallback import attempt, say_how
from quantline.recipes.layer_report import LayerJudge, check_gain


@dataclass
class BlockScales:
    """The scales of the linear layers of one block.

    Attributes:
        weights: Layer → its weight, float32 [out, in].
        input_scales: Layer → what multiplies its weight and divides its input, float32 [in].
        row_divisors: Layer → the scales of the next layer's input, which divide the rows of its
            weight, float32 [out].
        folded: Module before an input → the layers that read the input, and how far their scales
            go; in the order of the search.
    """

    weights: dict[str, torch.Tensor]
    input_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    row_divisors: dict[str, torch.Tensor] = field(default_factory=dict)
    folded: dict[str, tuple[tuple[str, ...], float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin without scaling."""
        for name, weight in self.weights.items():
            self.input_scales[name] = torch.ones_like(weight[0])
            self.row_divisors[name] = torch.ones_like(weight[:, 0])

    def fold(
        self,
        before: str,
        linears: tuple[str, ...],
        scales: torch.Tensor,
        strength: float | None,
    ) -> None:
        """Scale an input; the module before it is divided by the scales.

        Args:
            before: The module.
            linears: The layers that read the input.
            scales: float32 [in].
            strength: How far they go, as the manifest says.
        """
        for name in linears:
            self.input_scales[name] = scales
        self.folded[before] = (linears, strength)
        if before in self.weights:
            self.row_divisors[before] = scales

    def unfold(self, before: str) -> None:
        """Undo what `fold` did for the input after a linear layer."""
        linears, _ = self.folded.pop(before)
        self.row_divisors[before] = torch.ones_like(self.row_divisors[before])
        for name in linears:
            self.input_scales[name] = torch.ones_like(self.input_scales[name])


@same_bits()
def quantize_block(ctx: QuantizationContext, layer: int) -> dict[str, Any]:
    """Quantize the linear layers of a block.

    They go to the writer, and so does what their scales are folded into.

    Args:
        ctx: What to quantize, and how.
        layer: The number of the block.

    Returns:
        {layers: the report of each, transforms: what was folded into what}.

    Raises:
        StageError: unsupported_architecture, if scales can be folded nowhere; non_finite; as the
            method and the calibration do, but for what concerns one layer alone
            (quantline/recipes/fallback.py).
    """
    check_foldable(ctx)
    groups = ctx.arch.input_groups(layer)
    scales = search_block_scales(ctx, groups)
    transforms = _fold_scales(ctx, groups, scales)
    reports: dict[str, Any] = {}
    for group in groups:
        of_group = _quantize_group(ctx, group.linears, scales)
        if group.reason:
            for report in of_group.values():
                report["unscaled"] = group.reason
        reports |= of_group
    return {"layers": reports, "transforms": transforms}


def check_foldable(ctx: QuantizationContext) -> None:
    """Check that scales can be folded somewhere, in some block.

    Raises:
        StageError: unsupported_architecture.
    """
    reasons = []
    for layer in range(ctx.arch.layers):
        for group in ctx.arch.input_groups(layer):
            if group.before is not None:
                return
            if group.reason:
                reasons.append(f"; {group.linears[0]}: {group.reason}")
    raise StageError(
        Failure.UNSUPPORTED_ARCHITECTURE,
        f"expected layers of {ctx.arch.model_type} that scales can be folded into, which "
        f"{ctx.recipe.method} needs, and found none{''.join(reasons[:1])}; take gptq",
    )


def linears_without_scales(groups: list[InputGroup]) -> set[str]:
    """Return the layers whose own input cannot be scaled."""
    return {name for group in groups if group.before is None for name in group.linears}


def search_block_scales(ctx: QuantizationContext, groups: list[InputGroup]) -> BlockScales:
    """Search the scales of all inputs of a block that can be scaled.

    What comes before an input may be a linear layer of the block, so the search goes from the last
    input to the first; where dividing a layer's rows would make it worse than rounding to nearest,
    the layers after it stay unscaled. Rows of a layer whose own input cannot be scaled (an expert's
    up) are divided by powers of two, since powers of two change no rounding.
    """
    weights = {name: ctx.weight(name) for group in groups for name in group.linears}
    for name, weight in weights.items():
        check_size(name, weight)
    block = BlockScales(weights)
    unscaled = linears_without_scales(groups)
    for group in reversed(groups):
        linears = group.linears
        before = group.before
        if before is None:
            continue
        method: InputScalingMethod[Any, Any] = ctx.method_of(linears[0])
        hessian = ctx.hessian(linears[0])
        shared = SharedInput(
            [weights[name] for name in linears],
            [ctx.statistics_without_fisher(name, hessian) for name in linears],
        )
        result = method.search_scales(shared, [block.row_divisors[name] for name in linears])
        if result is None:
            for name in linears:
                if name in block.folded:
                    block.unfold(name)
            result = method.search_scales(shared, None)
        # Without divisors there always are some, unless no error can be told from another.
        scales, strength = result or (torch.ones_like(weights[linears[0]][0]), 0.0)
        if before in unscaled:
            scales = _powers_of_two(method, shared, scales)
        block.fold(before, linears, scales, strength)
    return block


def _powers_of_two(
    method: InputScalingMethod[Any, Any], shared: SharedInput, scales: torch.Tensor
) -> torch.Tensor:
    """Round the scales [in] of a single layer, or their square roots, to powers of two.

    Those are returned that leave the least error; all are 1 where that is without scaling.
    """
    candidates = [torch.ones_like(scales)]
    for strength in (1.0, 0.5):
        candidates.append(torch.exp2((scales.log2() * strength).round()))
    weight = shared.weights[0]
    statistics = shared.statistics[0]
    return min(candidates, key=lambda scales: method.remaining_error(weight, scales, statistics))


def divided_tensors(
    source: TensorSource, before: str, scales: np.ndarray, norm_offset: float | None
) -> dict[str, np.ndarray]:
    """Return what makes up for the scales of an input in the module before it.

    The weight of a linear layer is not part of it: it is rounded, and its rows are divided where
    that is done.

    Args:
        source: The tensors of the model.
        before: The module.
        scales: float32 [in].
        norm_offset: What it adds to its weight, if it is a norm; None for a linear layer.

    Returns:
        {tensor: values} of a norm's weight and of a bias, if there is one, float32.
    """
    tensors = {}
    if norm_offset is not None:
        offset = np.float32(norm_offset)
        weight = source.tensor(f"{before}.weight")
        tensors[f"{before}.weight"] = (weight + offset) / scales - offset
    bias = source.optional(f"{before}.bias")
    if bias is not None:
        tensors[f"{before}.bias"] = bias / scales
    return tensors


def _fold_scales(
    ctx: QuantizationContext, groups: list[InputGroup], block: BlockScales
) -> list[dict[str, Any]]:
    """Give the writer the tensors that scales are folded into; return the steps of the manifest."""
    unscaled = linears_without_scales(groups)
    offsets = {group.before: group.norm_offset for group in groups}
    steps = []
    for before, (linears, strength) in reversed(block.folded.items()):
        step: dict[str, Any] = {
            "step": "fold_scales",
            "into": before,
            "of": list(linears),
            ctx.method_of(linears[0]).strength_key: strength,
        }
        if before in unscaled:
            step["powers_of_two"] = True
        steps.append(step)
        scales = block.input_scales[linears[0]].cpu().numpy()
        offset = None if before in block.weights else offsets[before]
        for name, values in divided_tensors(ctx.source, before, scales, offset).items():
            ctx.writer.add_override(name, values)
    return steps


def _quantize_group(
    ctx: QuantizationContext, linears: tuple[str, ...], block: BlockScales
) -> dict[str, Any]:
    """Quantize the layers that read one input; return their reports."""
    hessian = ctx.hessian(linears[0])
    scaled_hessian = scale_hessian(hessian, block.input_scales[linears[0]])
    preparation = attempt(partial(ctx.method_of(linears[0]).prepare, scaled_hessian))
    return {name: _quantize_linear(ctx, name, block, hessian, preparation) for name in linears}


def _quantize_linear(
    ctx: QuantizationContext,
    name: str,
    block: BlockScales,
    hessian: torch.Tensor,
    preparation: tuple[Prepared | None, StageError | None],
) -> dict[str, Any]:
    """Quantize one layer, give it to the writer, and return its report.

    Args:
        ctx: What to quantize, and how.
        name: Of the layer.
        block: The scales of its block.
        hessian: H of its input, which is not scaled.
        preparation: What the method made of H, or why it could not: then the layer is rounded to
            nearest, as where that is better.
    """
    method: InputScalingMethod[Any, Any] = ctx.method_of(name)
    weight = block.weights[name]
    scales = block.input_scales[name]
    divisors = block.row_divisors[name]
    statistics = ctx.statistics(name, hessian)
    scaled = weight * scales / divisors[:, None]
    plain = dequantize_like(method.quantize_baseline(name, weight), weight)
    judge = LayerJudge(weight, plain, statistics)
    prepared, failure = preparation

    def report_of(linear: QuantizedTensor) -> dict[str, Any]:
        stored = dequantize_like(linear, weight) * divisors[:, None] / scales
        report = judge.report(linear, stored, ctx.calibration.coverage(name), prepared)
        return report | method.extra_report(weight, stored * scales, scales, statistics)

    linear: QuantizedTensor | None = None
    if failure is None:
        linear = method.quantize(scaled, statistics.scaled(scales, divisors), prepared)
        report = report_of(linear)
        _, failure = attempt(lambda: check_gain(name, report, ctx.recipe.baseline))
    if failure is not None or linear is None:
        linear = method.quantize_baseline(name, scaled)
        report = report_of(linear)
    ctx.writer.add_linear(name, linear)
    say_how(ctx, name, report, failure)
    return report
