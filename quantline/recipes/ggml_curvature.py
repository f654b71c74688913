"""Rounding to ggml's blocks by curvature, and the scales of inputs that go before it.

Inputs are divided by the scales and weights multiplied, so that the function stays the same. What
divides an input is what comes before it: a norm, or a linear layer of the same block, whose rows
are divided.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from quantline.methods.ggml.block_types import dequantize_blocks
from quantline.methods.ggml.input_scales import search_scales
from quantline.methods.ggml.method import BlockMethod
from quantline.methods.ggml.mixes import FLOAT_TYPES
from quantline.methods.ggml.quantize import LARGEST_WEIGHT, quantize_blocks
from quantline.methods.integer.curvature import error_and_divergence
from quantline.methods.method import LayerStatistics
from quantline.model.same_bits import same_bits
from quantline.recipes.context import QuantizationContext
from quantline.recipes.fallback import attempt, say_how
from quantline.recipes.input_scaling import divided_tensors
from quantline.recipes.layer_report import check_gain

BASELINE = "ggml"  # what every layer is compared with


def layer_statistics(ctx: QuantizationContext, layer: str) -> LayerStatistics:
    """Return H and G of a layer on the CPU, where the kernels run."""
    return LayerStatistics(
        layer,
        torch.from_numpy(ctx.moments(layer)),
        torch.from_numpy(ctx.calibration.fisher_out(layer)),
    )


@dataclass
class InputScaling:
    """The scales of the inputs of one block.

    Attributes:
        input_scales: Layer → what multiplies its weight and divides its input, float32 [in].
        row_divisors: Layer → the scales of the next layer's input, which divide the rows of its
            weight, float32 [out].
        tensors: Norms and biases that scales were folded into, by tensor.
        transforms: The steps of the manifest.
    """

    input_scales: dict[str, np.ndarray] = field(default_factory=dict)
    row_divisors: dict[str, np.ndarray] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    transforms: list[dict[str, Any]] = field(default_factory=list)

    def input_scales_of(self, layer: str, weight: torch.Tensor) -> torch.Tensor:
        """Return what multiplies the columns of a layer's weight [out, in]; 1 without scales."""
        if layer in self.input_scales:
            return torch.from_numpy(self.input_scales[layer])
        return torch.ones(weight.shape[1])

    def row_divisors_of(self, layer: str, weight: torch.Tensor) -> torch.Tensor:
        """Return what divides the rows of a layer's weight [out, in]; 1 without scales."""
        if layer in self.row_divisors:
            return torch.from_numpy(self.row_divisors[layer])
        return torch.ones(weight.shape[0])


def search_input_scaling(ctx: QuantizationContext, layer: int) -> InputScaling:
    """Search the scales of a block, from its last input to its first.

    That is the order, since a scale may divide the rows of a layer before. A tensor in floats stays
    what it is in the source, and so does all that would have to be scaled with it.
    """
    scaling = InputScaling()
    for group in reversed(ctx.arch.input_groups(layer)):
        linears = group.linears
        before = group.before
        if before is None:
            continue
        is_norm = before not in ctx.calibration.layers
        scaled = linears if is_norm else (*linears, before)
        if any(_ggml_type(ctx, name) in FLOAT_TYPES for name in scaled):
            continue
        weights = [torch.from_numpy(ctx.source.tensor(f"{name}.weight")) for name in linears]
        divisors = [
            scaling.row_divisors_of(name, weight)
            for name, weight in zip(linears, weights, strict=True)
        ]
        scales, strength = search_scales(
            weights,
            [_ggml_type(ctx, name) for name in linears],
            torch.from_numpy(ctx.moments(linears[0])),
            [torch.from_numpy(ctx.calibration.fisher_out(name)) for name in linears],
            divisors,
        )
        scale_values = scales.numpy()
        if not is_norm and not _can_divide(ctx, before, scale_values):
            continue
        for name in linears:
            scaling.input_scales[name] = scale_values
        if not is_norm:
            scaling.row_divisors[before] = scale_values
        offset = group.norm_offset if is_norm else None
        scaling.tensors |= divided_tensors(ctx.source, before, scale_values, offset)
        step = {"step": "fold_scales", "into": before, "of": list(linears), "reach": strength}
        scaling.transforms.insert(0, step)
    return scaling


def _can_divide(ctx: QuantizationContext, layer: str, divisors: np.ndarray) -> bool:
    """Whether ggml can hold the rows of a layer's weight [out, in], divided by divisors [out]."""
    largest = np.abs(ctx.source.tensor(f"{layer}.weight")).max(1)
    return bool((largest / divisors <= LARGEST_WEIGHT).all())


def _ggml_type(ctx: QuantizationContext, layer: str) -> str:
    """Return the type that a layer's weight has in the file."""
    _, actual = ctx.tensor_types.types(f"{layer}.weight")
    return actual


class CurvatureRounding:
    """Rounds the calibrated weights of one block.

    Attributes:
        scaling: The scales of its inputs.
        replaced: Norms and biases that scales were folded into, by tensor.
        transforms: The steps of the manifest.
    """

    @same_bits()
    def __init__(
        self, ctx: QuantizationContext, method: BlockMethod[Any], layer: int | None
    ) -> None:
        """Search the block's scales.

        There are none outside all blocks, where the recipe wants none, and in a converter's file,
        whose norms may not be the checkpoint's.
        """
        self.ctx = ctx
        self.method = method
        self.scaling = InputScaling()
        if layer is not None and method.scales_inputs and not ctx.source.converted:
            self.scaling = search_input_scaling(ctx, layer)
        self.replaced = self.scaling.tensors
        self.transforms = self.scaling.transforms

    @same_bits()
    def quantize(
        self, name: str, ggml_type: str, importance: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Round a tensor, whose rows a converter may have put into another order.

        The calibration knows them in the order of the checkpoint.

        Args:
            name: Of the tensor.
            ggml_type: The type of the blocks.
            importance: How much each input matters, float32 [in].

        Returns:
            The blocks uint8 [out, bytes per row], and what the report says of them.

        Raises:
            StageError: unsupported_architecture, if the rows are not the checkpoint's; as the
                method does, but for what concerns one layer alone.
        """
        layer = self.ctx.source.layer_of(name)
        assert layer is not None, f"{name} has importance, so its layer is known"
        weight = self.ctx.source.tensor(name)
        order = self.ctx.source.row_order(name)
        if order is None:
            return self.quantize_weight(layer, weight, ggml_type, importance)
        in_order = weight[np.argsort(order)]
        data, report = self.quantize_weight(layer, in_order, ggml_type, importance)
        return data[order], report

    def quantize_weight(
        self, layer: str, weight: np.ndarray, ggml_type: str, importance: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Round the weight float32 [out, in] of a layer, and compare with ggml's own rounding.

        Arguments, returns and raises are as in `quantize`.
        """
        matrix = torch.from_numpy(weight)
        statistics = layer_statistics(self.ctx, layer)
        assert statistics.fisher_out is not None
        scales = self.scaling.input_scales_of(layer, matrix)
        divisors = self.scaling.row_divisors_of(layer, matrix)
        scaled = (matrix * scales / divisors[:, None]).numpy()
        done, failure = attempt(
            lambda: self.method.quantize(
                scaled, ggml_type, importance, statistics.scaled(scales, divisors)
            )
        )
        diagonal = statistics.hessian.diagonal().numpy()
        plain = quantize_blocks(weight, ggml_type, diagonal, kernel="numba")
        baseline = torch.from_numpy(dequantize_blocks(plain, ggml_type))
        moments = (statistics.hessian, statistics.fisher_out)
        ggml_error, ggml_divergence = error_and_divergence(baseline - matrix, *moments)

        def figures(data: np.ndarray) -> dict[str, Any]:
            rounded = torch.from_numpy(dequantize_blocks(data, ggml_type))
            stored = rounded * divisors[:, None] / scales
            error, divergence = error_and_divergence(stored - matrix, *moments)
            return {
                "error": error,
                "divergence": divergence,
                "ggml_error": ggml_error,
                "ggml_divergence": ggml_divergence,
            }

        if done is not None:
            data, report = done
            report |= figures(data)
            _, failure = attempt(lambda: check_gain(layer, report, BASELINE))
        if done is None or failure is not None:
            scaled_diagonal = diagonal / scales.numpy() ** 2
            data = quantize_blocks(scaled, ggml_type, scaled_diagonal, kernel="numba")
            report = figures(data)
        say_how(self.ctx, layer, report, failure)
        return data, report
