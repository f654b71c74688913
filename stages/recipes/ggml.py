"""kquant and kquant-curvature: tensors in ggml's blocks."""

import numpy as np

from stages.checkpoints.converted import Converted
from stages.methods import kquant
from stages.recipes.work import Work
from stages.tracking import Failure, StageError


def round_block(work: Work, layer: int | None) -> dict:
    """The report of a block, or of what lies outside of all blocks, whose tensors go to the writer in the types that the
    mix and their widths give. Without calibration a tensor is rounded by ggml in either method.
    """
    reports = {}
    for name in work.checkpoint.names:
        if work.facts.layer_index(name) != layer:
            continue
        tensor, (wanted, actual) = work.checkpoint.raw(name), work.mixture.types(name)
        importance, tokens = work.mixture.importance(name, actual)
        if work.recipe.method == "kquant-curvature" and importance is not None:
            data, more = curved_in_file(work, name, work.checkpoint.tensor(name), actual)
        else:
            rows = tensor.reshape(-1, tensor.shape[-1])
            data, more = kquant.quantize(rows, actual, importance, kernel=work.recipe.kernel), {}
            if tokens:
                from stages.recipes.report import blocks_report

                more = blocks_report(work, work.mixture.layer(name), tensor, actual, data)
        work.writer.add_blocks(name, actual, data, tensor.shape)
        reports[name] = {"requested": wanted, "actual": actual, "shape": list(tensor.shape), "tokens": tokens,
                         "importance": importance is not None} | more
    return {"layers": reports, "transforms": []}


def curved_in_file(work: Work, name: str, tensor: np.ndarray, kind: str) -> tuple[np.ndarray, dict]:
    """As `curved_blocks`, of a tensor whose rows a converter may have put into another order than the calibration knows.

    Raises StageError(unsupported_architecture) if they are not the checkpoint's rows.
    """
    layer = work.mixture.layer(name)
    if not isinstance(work.checkpoint, Converted):
        return curved_blocks(work, layer, tensor, kind)
    order = work.checkpoint.row_order(name)
    if order is None:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected the rows of {layer} in {name}, as curvature rounding "
                         "needs them, found other ones, which the converter made; take the method kquant")
    data, more = curved_blocks(work, layer, tensor[np.argsort(order)], kind)
    return data[order], more


def curved_blocks(work: Work, module: str, weight: np.ndarray, kind: str) -> tuple[np.ndarray, dict]:
    """(ggml blocks of a weight [out, in] by kquant-curvature, what is told of them, held against ggml's own rounding)."""
    import torch

    from stages.methods import kquant_curvature
    from stages.methods.curvature import divergence
    from stages.methods.ggml_blocks import dequantize
    from stages.methods.grid import output_error
    from stages.recipes.report import check_gain

    moment, factors, recipe = work.moments.moment(module), work.moments.factors(module), work.recipe
    data, damping = kquant_curvature.quantize(weight, kind, moment, factors, recipe.damping, recipe.rounds)
    report, metric = {"damping": damping}, [torch.from_numpy(one) for one in (weight, moment, factors)]
    for plain, blocks in (("", data), ("ggml_", kquant.quantize(weight, kind, np.diagonal(moment), kernel="numba"))):
        stored = torch.from_numpy(dequantize(blocks, kind))
        report |= {f"{plain}error": output_error(metric[0], stored, metric[1]),
                   f"{plain}divergence": divergence(stored - metric[0], *metric[1:])}
    check_gain(module, report, "ggml")
    return data, report
