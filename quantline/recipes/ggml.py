"""kquant and kquant-curvature: tensors in ggml's blocks."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from quantline.methods.ggml import quantize as kquant
from quantline.methods.ggml.block_types import dequantize, grid_like
from quantline.methods.ggml.mixes import FLOATS
from quantline.methods.integer.rtn_numpy import nearest
from quantline.recipes.context import Work

ERROR_ROWS = 512  # of a tensor whose error is computed


def round_block(work: Work, layer: int | None) -> dict:
    """The report of a block, or of what lies outside of all blocks, whose tensors go to the writer in the types that the
    mix and their widths give. Without calibration a tensor is rounded by ggml in either method.
    """
    reports, folds = {}, None
    if work.recipe.method == "kquant-curvature":  # torch, which the other does without
        from quantline.recipes import ggml_curvature as ggml_curved

        folds = ggml_curved.fold(work, layer)

    def rounded(name: str) -> tuple[str, np.ndarray, tuple[int, ...], dict]:
        tensor, (wanted, actual) = work.checkpoint.raw(name), work.mixture.types(name)
        importance, tokens = work.mixture.importance(name, actual)
        if folds and importance is not None:
            data, more = ggml_curved.in_file(work, name, actual, folds)
        else:
            rows = (folds.tensors.get(name, tensor) if folds else tensor).reshape(-1, tensor.shape[-1])
            data = kquant.quantize(rows, actual, importance, kernel=work.recipe.kernel)
            more = blocks_report(work, work.mixture.layer(name), tensor, actual, data) if tokens else {}
        return actual, data, tensor.shape, {"requested": wanted, "actual": actual, "shape": list(tensor.shape), "tokens": tokens,
                                            "importance": importance is not None} | more

    names = [name for name in work.checkpoint.names if work.facts.layer_index(name) == layer]
    with ThreadPoolExecutor(2) as pool:  # one tensor of a block is read while another is rounded; torch has threads of its own
        for name, (kind, data, shape, report) in zip(names, (map if folds or layer is None else pool.map)(rounded, names), strict=True):
            work.writer.add_blocks(name, kind, data, shape)
            reports[name] = report
    return {"layers": reports, "transforms": folds.transforms if folds else []}


def blocks_report(work: Work, module: str, weight: np.ndarray, kind: str, data: np.ndarray) -> dict:
    """What is told of a weight [out, in] in ggml's blocks: the error Σ ΔW² diag(H), which is what an importance matrix
    lowers, held against that of round-to-nearest with as many bits and groups as large (None if the type is no grid).

    Of a tall matrix that is seen on `ERROR_ROWS` rows, evenly spread, and scaled up, so that telling it costs little beside
    the rounding. Nothing is told of a tensor that has no calibration, as the embedding, or whose type is a plain float.
    """
    if module not in work.moments.layers or kind in FLOATS:
        return {}
    rows = np.unique(np.linspace(0, len(weight) - 1, ERROR_ROWS).round().astype(int))
    some, squares, grid = weight[rows].astype(np.float32), work.moments.diagonal(module), grid_like(kind)

    def error(stored: np.ndarray) -> float:
        return float(((stored - some) ** 2 @ squares).sum(dtype=np.float64)) * len(weight) / len(rows)

    return {"diagonal_error": error(dequantize(data[rows], kind)), "rtn_diagonal_error": error(nearest(some, *grid)) if grid else None,
            "error_rows": len(rows)}
