"""rtn, gptq, int8 and fp8: each linear layer of a block on its own."""

import torch

from stages.checkpoints.canonical import FloatLinear, GroupedLinear
from stages.config import AnyRecipe
from stages.methods import curvature, fp8, gptq, int8, rtn, spans
from stages.methods.grid import check_finite, check_width
from stages.methods.polish import polish
from stages.recipes.report import check_gain, dense, layer_report
from stages.recipes.work import Work


def rounded(name: str, recipe: AnyRecipe, weight: torch.Tensor, moment: torch.Tensor,
            factors: torch.Tensor | None) -> tuple[GroupedLinear | FloatLinear, float | None]:
    """(a weight [out, in] rounded by a recipe with its statistics, the damping if there was one)."""
    check_finite(name, weight)
    if recipe.method in ("int8", "smoothquant", "fp8"):
        return (fp8 if recipe.method == "fp8" else int8).quantize(weight), None
    grid = (recipe.bits, check_width(name, weight.shape[1], recipe.group_size), recipe.symmetric)
    weighted, damping, curved = recipe.scales == "weighted", None, factors is not None and recipe.curvature
    if recipe.method == "gptq":
        linear, damping = gptq.quantize(weight, moment, *grid, recipe.act_order, recipe.damping, weighted)
    elif recipe.method == "awq" and recipe.rounding == "gptq":
        linear, damping = gptq.quantize(weight, moment, *grid, weighted=weighted)
    elif recipe.method == "awq" and weighted:
        linear = spans.quantize(weight, moment, *grid)
    else:
        linear = rtn.quantize(weight, *grid, moment.diagonal() if weighted else None)
    if curved:
        linear = curvature.refine(linear, weight, moment, factors)
    elif damping is not None:
        linear = polish(linear, weight, moment)
    return linear, damping


def round_block(work: Work, layer: int) -> dict:
    """The report of a block, whose rounded layers go to the writer."""
    reports = {}
    for name in work.facts.linears_of(layer):
        weight, moment, factors = work.weight(name), work.moment(name), work.factors(name)
        linear, damping = rounded(name, work.recipe_of(name), weight, moment, factors)
        work.writer.add_linear(name, linear)
        reports[name] = layer_report(name, linear, weight, dense(linear, weight), moment, factors,
                                     work.moments.seen(name), damping)
        check_gain(name, reports[name])
    return {"layers": reports, "transforms": []}
