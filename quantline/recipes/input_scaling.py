"""awq and smoothquant: the layers of a block that share an input are scaled together."""

import numpy as np
import torch

from quantline.methods.integer import awq, int8, rtn, smoothquant
from quantline.methods.integer.grid import check_finite, check_width, row_errors
from quantline.recipes.layerwise import rounded, solve
from quantline.recipes.layer_report import check_gain, dense, layer_report
from quantline.recipes.context import Work
from quantline.errors import Failure, StageError


def output_changes(work: Work, name: str, scaled: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> dict:
    """The mean squared change of a layer's output where inputs are rounded too, beside that without the scales [in]."""
    sample = work.on_device(work.moments.sample(name))
    return {"output_change": smoothquant.output_change(weight, scaled, sample, scales),
            "rtn_output_change": smoothquant.output_change(weight, dense(int8.quantize(weight), weight), sample, scales**0)}


def divided(work: Work, before: str, divisor: np.ndarray, norm: bool) -> dict[str, np.ndarray]:
    """{tensor: values} of what makes up for scales [in] in the module before them: of a `norm` the weight, and the bias
    where there is one. The weight of a linear layer is rounded, and so its rows are divided where that is done.
    """
    found, offset = {}, np.float32(work.facts.family.norm_offset)
    if norm:
        found[f"{before}.weight"] = (work.checkpoint.tensor(f"{before}.weight") + offset) / divisor - offset
    if f"{before}.bias" in work.checkpoint.files:
        found[f"{before}.bias"] = work.checkpoint.tensor(f"{before}.bias") / divisor
    return found


def powers_of_two(work: Work, name: str, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Scales [in] of one layer, or their square roots, as powers of two; 1 where neither leaves less than no scaling."""
    recipe, plain = work.recipe_of(name), torch.ones_like(scales)

    def left(scales: torch.Tensor) -> float:
        if recipe.method == "smoothquant":
            sample = work.on_device(work.moments.sample(name))
            return smoothquant.output_change(weight, dense(int8.quantize(weight * scales), weight), sample, scales)
        size = scales.numel() if recipe.group_size == -1 else recipe.group_size
        stored = dense(rtn.quantize(weight * scales, recipe.bits, size, recipe.symmetric), weight) / scales
        return float(row_errors(weight, stored, work.moment(name)) @ work.importance(name).double())

    candidates = [torch.exp2((scales.log2() * reach).round()) for reach in (1.0, 0.5)]
    return min([plain, *candidates], key=left)


def round_block(work: Work, layer: int) -> dict:
    """The report of a block, whose rounded layers, and what the scales are folded into, go to the writer.

    Inputs are divided by the scales and weights multiplied, so the function stays the same. What comes before may be
    a linear layer of the same block (up before down), whose rows are divided; so the search goes from the last group to
    the first, and where a layer does not bear that division, those after it stay unscaled. Rows of a layer that has no scales
    of its own to make up for it (an expert's up) are divided by powers of two, which no rounding notices.
    """
    recipe, groups, transforms, reports = work.recipe, work.facts.input_groups(layer), [], {}
    if all(before is None for _, before in groups):
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected layers of {work.facts.model_type} that scales can be folded "
                         f"into, which {recipe.method} needs, and know of none; take gptq")
    weights = {name: work.weight(name) for linears, _ in groups for name in linears}
    for name, weight in weights.items():
        check_finite(name, weight)
    columns = {name: torch.ones_like(weight[0]) for name, weight in weights.items()}
    rows = {name: torch.ones_like(weight[:, 0]) for name, weight in weights.items()}
    folds: dict[str, tuple[list[str], float | None]] = {}
    bare = {name for linears, before in groups if before is None for name in linears}
    for linears, before in reversed(groups):
        if before is None:
            continue
        moment, ours = work.moment(linears[0]), [weights[name] for name in linears]
        if recipe.method == "smoothquant":  # rows of one scale each do not mind being divided
            peak = work.on_device(work.moments.peak(linears[0]))
            sample = work.on_device(work.moments.sample(linears[0]))
            found = smoothquant.search_scales(ours, peak, sample, recipe.grid, recipe.smoothing)
        else:
            own = work.recipe_of(linears[0])
            grid = (own.bits, check_width(linears[0], len(moment), own.group_size), own.symmetric, own.grid)
            importance = [work.importance(name) for name in linears]
            found = awq.search_scales(ours, moment, *grid, [rows[name] for name in linears], importance)
            if found is None:
                for after, (others, _) in [(name, folds.pop(name)) for name in linears if name in folds]:
                    rows[after] = torch.ones_like(rows[after])
                    columns |= {name: torch.ones_like(columns[name]) for name in others}
                found = awq.search_scales(ours, moment, *grid, None, importance)
        scales, exponent = found
        if before in bare:
            scales = powers_of_two(work, linears[0], ours[0], scales)
        columns |= dict.fromkeys(linears, scales)
        folds[before] = (linears, exponent)
        if before in weights:
            rows[before] = scales
    strength = "exponent" if recipe.method == "smoothquant" else "reach"
    for before, (linears, exponent) in reversed(folds.items()):
        transforms.append({"step": "fold_scales", "into": before, "of": linears, strength: exponent,
                           **({"powers_of_two": True} if before in bare else {})})
        for tensor, values in divided(work, before, columns[linears[0]].cpu().numpy(), before not in weights).items():
            work.writer.add_override(tensor, values)
    for linears, _ in groups:
        moment = work.moment(linears[0])
        scaled = awq.scaled_moment(moment, columns[linears[0]])
        solved = solve(recipe, scaled)
        for name in linears:
            factors = work.factors(name)
            linear = rounded(name, work.recipe_of(name), weights[name] * columns[name] / rows[name][:, None], scaled,
                             awq.scaled_factors(factors, rows[name]), solved)
            work.writer.add_linear(name, linear)
            stored = dense(linear, weights[name]) * rows[name][:, None] / columns[name]
            reports[name] = layer_report(name, linear, weights[name], stored, moment, factors, work.moments.seen(name),
                                         solved and solved.damping)
            if recipe.method == "smoothquant":
                reports[name] |= output_changes(work, name, stored * columns[name], weights[name], columns[name])
            check_gain(name, reports[name])
    return {"layers": reports, "transforms": transforms}
