"""The driver for recipes in ggml's blocks: every tensor gets the type that its mix means for it.

It imports no torch, which k-quants without curvature do not need.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from quantline.methods.ggml.block_types import dequantize_blocks, plain_grid_of
from quantline.methods.ggml.method import BlockMethod
from quantline.methods.ggml.mixes import FLOAT_TYPES
from quantline.methods.integer.rtn_numpy import round_to_nearest
from quantline.methods.method import load_method
from quantline.quantized.tensors import GgmlBlocks
from quantline.recipes.context import QuantizationContext
from quantline.recipes.fallback import KEY, say_how

if TYPE_CHECKING:
    from quantline.recipes.ggml_curvature import CurvatureRounding

ERROR_ROWS = 512  # of a tensor whose error is computed
TENSORS_AT_ONCE = 2  # one tensor is read while another is rounded


def quantize_block(ctx: QuantizationContext, layer: int | None) -> dict[str, Any]:
    """Round the tensors of a block and give them to the writer.

    A tensor that was not calibrated is rounded without importance in every recipe.

    Args:
        ctx: What to quantize, and how.
        layer: The number of the block; None for what lies outside all blocks.

    Returns:
        {layers: the report of each tensor, transforms: what was folded into what}.

    Raises:
        StageError: worse_than_round_to_nearest; as the method and the calibration do.
    """
    method: BlockMethod[Any] = load_method(ctx.recipe)
    curvature = _curvature_rounding(ctx, method, layer)

    def run(name: str) -> tuple[GgmlBlocks, dict[str, Any]]:
        return quantize_tensor(ctx, method, curvature, name)

    names = [name for name in ctx.source.names if ctx.arch.layer_index(name) == layer]
    reports = {}
    with ThreadPoolExecutor(TENSORS_AT_ONCE) as pool:
        # Curvature rounding has threads of torch's own; outside of blocks tensors are large.
        one_by_one = curvature is not None or layer is None
        in_order: Callable[..., Any] = map if one_by_one else pool.map
        for name, (blocks, report) in zip(names, in_order(run, names), strict=True):
            ctx.writer.add_ggml_blocks(name, blocks)
            reports[name] = report
    transforms = curvature.transforms if curvature is not None else []
    return {"layers": reports, "transforms": transforms}


def _curvature_rounding(
    ctx: QuantizationContext, method: BlockMethod[Any], layer: int | None
) -> "CurvatureRounding | None":
    """Return what rounds a block's calibrated weights, if the recipe looks at their gradients."""
    if ctx.recipe.output_statistics != "full":
        return None
    from quantline.recipes.ggml_curvature import CurvatureRounding

    return CurvatureRounding(ctx, method, layer)


def quantize_tensor(
    ctx: QuantizationContext,
    method: BlockMethod[Any],
    curvature: "CurvatureRounding | None",
    name: str,
) -> tuple[GgmlBlocks, dict[str, Any]]:
    """Round one tensor.

    Args:
        ctx: What to quantize, and how.
        method: The recipe's.
        curvature: Rounds calibrated weights, where the recipe looks at output gradients.
        name: Of the tensor.

    Returns:
        The blocks, and the tensor's report.
    """
    requested, actual = ctx.tensor_types.types(name)
    importance, tokens = ctx.tensor_types.importance(name, actual)
    tensor = ctx.source.raw(name)
    report = {
        "requested": requested,
        "actual": actual,
        "shape": list(tensor.shape),
        "tokens": tokens,
        "importance": importance is not None,
    }
    if not ctx.tensor_types.is_expected(name) and ctx.arch.layer_index(name) is not None:
        report |= unweighted(ctx, actual)
    codes = ctx.source_codes.blocks(name, actual) if curvature is None else None
    if codes is not None:
        # Rounding again what these stand for could only lose.
        return GgmlBlocks(actual, codes, tensor.shape), report | {"codes": "the source's own"}
    whole = ctx.source.has_rows_of_layer(name)
    if curvature is not None and importance is not None and whole:
        data, extra = curvature.quantize(name, actual, importance)
        return GgmlBlocks(actual, data, tensor.shape), report | extra
    values = tensor if curvature is None else curvature.replaced.get(name, tensor)
    rows = values.reshape(-1, values.shape[-1])
    data, extra = method.quantize(rows, actual, importance, None)
    report |= extra
    layer = ctx.source.layer_of(name)
    if tokens:
        report |= diagonal_errors(ctx, layer, tensor.reshape(rows.shape), actual, data, name)
    if layer is not None and importance is not None:
        say_how(ctx, layer, report, None)
        if curvature is not None:
            report.setdefault(KEY, "rounded by importance alone: its rows are not those of a layer")
    return GgmlBlocks(actual, data, tensor.shape), report


def unweighted(ctx: QuantizationContext, ggml_type: str) -> dict[str, str]:
    """Return what the report says of a tensor that a converter made of other rows than a layer's.

    Args:
        ctx: With the recipe.
        ggml_type: The type that the tensor has.
    """
    if ggml_type in FLOAT_TYPES or ctx.tensor_types.matrix is None:
        return {}
    return {KEY: "rounded as if all inputs mattered alike: its rows are none of a known layer"}


def weighted_square(difference: np.ndarray, importance: np.ndarray) -> float:
    """Return Σ ΔW² diag(H), without BLAS, whose last bits depend on the number of threads.

    Args:
        difference: ΔW, float32 [out, in].
        importance: diag(H), float32 [in].
    """
    return float((difference**2 * importance).sum(dtype=np.float64))


def diagonal_errors(
    ctx: QuantizationContext,
    layer: str | None,
    weight: np.ndarray,
    ggml_type: str,
    data: np.ndarray,
    name: str | None = None,
) -> dict[str, Any]:
    """Return the error Σ ΔW² diag(H) of a weight, which an importance matrix lowers.

    Of a tall matrix it is computed on ERROR_ROWS rows, evenly spread, and scaled up, so that it
    costs little beside the rounding.

    Args:
        ctx: With the calibration.
        layer: The module whose weight it is, if that is known.
        weight: [out, in].
        ggml_type: The type of the blocks.
        data: The blocks uint8 [out, bytes per row].
        name: Of the tensor, where its columns may be in another order than the layer's.

    Returns:
        The error, and for comparison that of rounding to nearest with as many bits and groups as
        large (None for a type of a codebook). Nothing for a layer that was not calibrated, and for
        floats.
    """
    if layer is None or layer not in ctx.calibration.layers or ggml_type in FLOAT_TYPES:
        return {}
    spread = np.linspace(0, len(weight) - 1, ERROR_ROWS).round().astype(int)
    rows = np.unique(spread)
    sample = weight[rows].astype(np.float32)
    importance = ctx.calibration.hessian_diagonal(layer)
    if name is not None:
        importance = ctx.source.in_order_of(name, importance)

    def error(stored: np.ndarray) -> float:
        return weighted_square(stored - sample, importance) * len(weight) / len(rows)

    grid = plain_grid_of(ggml_type)
    baseline = None
    if grid is not None:
        baseline = error(round_to_nearest(sample, *grid))
    return {
        "diagonal_error": error(dequantize_blocks(data[rows], ggml_type)),
        "rtn_diagonal_error": baseline,
        "error_rows": len(rows),
    }
