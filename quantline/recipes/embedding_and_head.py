"""The embedding and the output head in grouped integers, for containers that hold them so.

Eight bits are rounded to nearest. Fewer are rounded by the recipe's method, which needs second
moments. Those of the head are of final hidden states. A row of the embedding is read as often as
its token comes, and its error Δ costs Δ G Δᵀ, with G of the gradient at what enters the first
block: so G is to the embedding what H is to a layer. A head that is the embedding has both costs,
and in both a row counts about as often as its token comes, so their matrices are added.
"""

from typing import Any

import numpy as np
import torch

from quantline.calibration import embedding_and_head
from quantline.calibration.store import shrink_to_diagonal
from quantline.config.recipes import GroupedRecipe
from quantline.methods.integer.output_error import choose_rows, dequantize_like, output_error
from quantline.methods.method import LayerStatistics, check_size, load_method
from quantline.methods.rtn import RtnRecipe
from quantline.model.same_bits import same_bits
from quantline.quantized.tensors import GroupedLinear
from quantline.recipes.context import QuantizationContext

WEIGHT = ".weight"
ROWS_AT_ONCE = 1 << 14


@same_bits()
def quantize(ctx: QuantizationContext) -> dict[str, Any]:
    """Round the embedding and the head, and give them to the writer.

    A row that no group size divides stays as it is: no container holds an embedding of it.

    Args:
        ctx: With a GroupedRecipe.

    Returns:
        {layers, transforms: none, outside: the report of each}.

    Raises:
        StageError: non_finite; as the method does.
    """
    reports = {}
    for name in dict.fromkeys((ctx.arch.embedding, ctx.arch.head)):
        rounded = round_outside(ctx, name)
        if rounded is None:
            continue
        module = name.removesuffix(WEIGHT)
        linear, reports[module] = rounded
        ctx.writer.add_outside(module, linear)
    return {"layers": {}, "transforms": [], "outside": reports}


def round_outside(
    ctx: QuantizationContext, name: str
) -> tuple[GroupedLinear, dict[str, Any]] | None:
    """Round the embedding or the head.

    Args:
        ctx: With a GroupedRecipe.
        name: The tensor.

    Returns:
        The rounded matrix and its report; None if it stays as it is.

    Raises:
        StageError: non_finite; as the method does.
    """
    recipe = recipe_outside(ctx, name)
    if recipe is None:
        return None
    return _round(ctx, name, recipe, _hessian(ctx, name, ctx.source.shape(name)[-1], recipe))


def recipe_outside(ctx: QuantizationContext, name: str) -> GroupedRecipe | None:
    """Return the recipe of the embedding or the head, with what a budget chose for it.

    None if it stays as it is.
    """
    shape = ctx.source.shape(name)
    recipe = ctx.recipe.model_copy(update=ctx.grids.get(name.removesuffix(WEIGHT)))
    assert isinstance(recipe, GroupedRecipe), "only these round outside of blocks here"
    if len(shape) != 2 or not name.endswith(WEIGHT) or not recipe.rounds_outside:
        return None
    return recipe.outside(shape[-1])


def _hessian(
    ctx: QuantizationContext, name: str, width: int, recipe: GroupedRecipe
) -> torch.Tensor | None:
    """Return the second moments float32 [hidden, hidden] for the method; None if it needs none."""
    if recipe.bits == 8 or not recipe.uses_calibration:
        return None
    folder = ctx.calibration.folder
    total = np.zeros((width, width), np.float32)
    if name == ctx.arch.head:
        states = embedding_and_head.final_states(folder)
        total += states.T @ states / len(states)
    if name == ctx.arch.embedding and ctx.calibration.has_gradients:
        fisher = embedding_and_head.embedding_fisher(folder)
        factor = ctx.arch.hidden_size if ctx.arch.family.scaled_embedding else 1
        size = fisher.shape[1]
        for number, block in enumerate(fisher):
            span = slice(number * size, (number + 1) * size)
            total[span, span] += block * factor
    if not total.any():  # an embedding alone, without gradients: all channels alike
        total = np.eye(width, dtype=np.float32)
    return ctx.on_device(shrink_to_diagonal(total, recipe.hessian_shrinkage))


def _round(
    ctx: QuantizationContext, name: str, recipe: GroupedRecipe, hessian: torch.Tensor | None
) -> tuple[GroupedLinear, dict[str, Any]]:
    """Round a matrix part by part.

    Returns:
        The rounded matrix and its report.
    """
    values = ctx.source.raw(name)
    module = name.removesuffix(WEIGHT)
    plain = load_method(_nearest(recipe))
    method = load_method(recipe)
    prepared = None if hessian is None else method.prepare(hessian)
    parts = []
    errors = [0.0, 0.0]
    for start in range(0, len(values), ROWS_AT_ONCE):
        rows = ctx.on_device(values[start : start + ROWS_AT_ONCE].astype(np.float32))
        check_size(module, rows)
        linear = plain.quantize_baseline(module, rows)
        if hessian is not None:
            errors[1] += output_error(rows, dequantize_like(linear, rows), hessian)
            own = method.quantize(rows, LayerStatistics(module, hessian), prepared)
            linear = choose_rows(rows, hessian, linear, own)
            errors[0] += output_error(rows, dequantize_like(linear, rows), hessian)
        parts.append(linear)
    report = {
        **parts[0].describe(),
        "shape": list(values.shape),
        "rounding": "nearest" if hessian is None else recipe.rounding_name,
    }
    if hessian is not None:
        report |= {"error": errors[0], "rtn_error": errors[1]}
    return _joined(parts), report


def _nearest(recipe: GroupedRecipe) -> RtnRecipe:
    """Return round to nearest on the grid of a recipe."""
    return RtnRecipe(
        method="rtn",
        bits=recipe.bits,
        group_size=recipe.group_size,
        symmetric=recipe.symmetric,
        scales="minmax",
    )


def _joined(parts: list[GroupedLinear]) -> GroupedLinear:
    """Return the parts of a matrix as one."""
    first = parts[0]
    return GroupedLinear(
        np.concatenate([part.integers for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate([part.zeros for part in parts]),
        first.bits,
        first.group_size,
        first.symmetric,
    )
