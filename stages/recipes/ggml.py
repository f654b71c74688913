"""kquant and kquant-curvature: tensors in ggml's blocks."""

import numpy as np
import torch

from stages.methods import kquant, kquant_curvature
from stages.methods.curvature import divergence
from stages.methods.ggml_blocks import dequantize
from stages.methods.grid import output_error
from stages.recipes.report import blocks_report, check_gain
from stages.recipes.work import Work


def round_block(work: Work, layer: int | None) -> dict:
    """The report of a block, or of what lies outside of all blocks, whose tensors go to the writer in the types that the
    mix and their widths give. Without calibration a tensor is rounded by ggml in either method.
    """
    reports = {}
    for name in work.checkpoint.names:
        if work.facts.layer_index(name) != layer:
            continue
        tensor, (wanted, actual) = work.checkpoint.tensor(name), work.mixture.types(name)
        importance, tokens = work.mixture.importance(name, actual)
        if work.recipe.method == "kquant-curvature" and importance is not None:
            data, more = curved_blocks(work, name.removesuffix(".weight"), tensor, actual)
            check_gain(name, more, "ggml")
        else:
            data, more = kquant.quantize(np.atleast_2d(tensor), actual, importance, kernel=work.recipe.kernel), {}
        work.writer.add_blocks(name, actual, data, tensor.shape)
        more = more or blocks_report(work, name.removesuffix(".weight"), tensor, actual, data)
        reports[name] = {"requested": wanted, "actual": actual, "shape": list(tensor.shape), "tokens": tokens,
                         "importance": importance is not None} | more
    return {"layers": reports, "transforms": []}


def curved_blocks(work: Work, module: str, weight: np.ndarray, kind: str) -> tuple[np.ndarray, dict]:
    """(ggml blocks of a weight [out, in] by kquant-curvature, what is told of them, held against ggml's own rounding)."""
    moment, factors, recipe = work.moments.moment(module), work.moments.factors(module), work.recipe
    data, damping = kquant_curvature.quantize(weight, kind, moment, factors, recipe.damping, recipe.rounds)
    report, metric = {"damping": damping}, [torch.from_numpy(one) for one in (weight, moment, factors)]
    for plain, blocks in (("", data), ("ggml_", kquant.quantize(weight, kind, np.diagonal(moment), kernel="numba"))):
        stored = torch.from_numpy(dequantize(blocks, kind))
        report |= {f"{plain}error": output_error(metric[0], stored, metric[1]),
                   f"{plain}divergence": divergence(stored - metric[0], *metric[1:])}
    return data, report
