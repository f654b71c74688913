"""rtn, gptq, int8 and fp8: each linear layer of a block on its own."""

from itertools import groupby

import torch

from quantline.quantized.store import FloatLinear, GroupedLinear
from quantline.config.recipes import AnyRecipe
from quantline.methods.integer import awq_clip as spans, curvature, fp8, gptq, int8, rtn
from quantline.methods.integer.grid import check_finite, check_width
from quantline.recipes.layer_report import check_gain, dense, layer_report
from quantline.recipes.context import Work


def solve(recipe: AnyRecipe, moment: torch.Tensor) -> gptq.Solved | None:
    """What GPTQ needs of the H that layers share, if the recipe rounds them by it."""
    if recipe.method == "gptq":
        return gptq.solve(moment, recipe.act_order, recipe.damping)
    return gptq.solve(moment) if recipe.method == "awq" and recipe.rounding == "gptq" else None


def rounded(name: str, recipe: AnyRecipe, weight: torch.Tensor, moment: torch.Tensor, factors: torch.Tensor | None,
            solved: gptq.Solved | None) -> GroupedLinear | FloatLinear:
    """A weight [out, in] rounded by a recipe with its statistics; `solved` is what `solve` makes of the recipe and `moment`."""
    check_finite(name, weight)
    if recipe.method in ("int8", "smoothquant", "fp8"):
        return (fp8 if recipe.method == "fp8" else int8).quantize(weight)
    grid = (recipe.bits, check_width(name, weight.shape[1], recipe.group_size), recipe.symmetric)
    weighted, curved = recipe.scales == "weighted", factors is not None and recipe.curvature
    if solved:
        linear = gptq.quantize(weight, moment, *grid, solved, weighted)
    elif recipe.method == "awq" and weighted:
        linear = spans.quantize(weight, moment, *grid)
    else:
        linear = rtn.quantize(weight, *grid, moment.diagonal() if weighted else None)
    if curved:
        return curvature.refine(linear, weight, moment, factors)
    return gptq.improve(linear, weight, moment, solved) if solved else linear


def round_block(work: Work, layer: int) -> dict:
    """The report of a block, whose rounded layers go to the writer."""
    reports = {}
    for _, names in groupby(work.facts.linears_of(layer), work.moments.shared):
        names = list(names)
        moment = work.moment(names[0])
        solved = solve(work.recipe, moment)
        for name in names:
            weight, factors = work.weight(name), work.factors(name)
            linear = rounded(name, work.recipe_of(name), weight, moment, factors, solved)
            work.writer.add_linear(name, linear)
            reports[name] = layer_report(name, linear, weight, dense(linear, weight), moment, factors,
                                         work.moments.seen(name), solved and solved.damping)
            check_gain(name, reports[name])
    return {"layers": reports, "transforms": []}
