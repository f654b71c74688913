"""kquant and kquant-curvature: tensors in ggml's blocks."""

from stages.methods import kquant
from stages.recipes.work import Work


def round_block(work: Work, layer: int | None) -> dict:
    """The report of a block, or of what lies outside of all blocks, whose tensors go to the writer in the types that the
    mix and their widths give. Without calibration a tensor is rounded by ggml in either method.
    """
    reports, folds = {}, None
    if work.recipe.method == "kquant-curvature":  # torch, which the other does without
        from stages.recipes import ggml_curved

        folds = ggml_curved.fold(work, layer)
    for name in work.checkpoint.names:
        if work.facts.layer_index(name) != layer:
            continue
        tensor, (wanted, actual) = work.checkpoint.raw(name), work.mixture.types(name)
        importance, tokens = work.mixture.importance(name, actual)
        if folds and importance is not None:
            data, more = ggml_curved.in_file(work, name, actual, folds)
        else:
            rows = (folds.tensors.get(name, tensor) if folds else tensor).reshape(-1, tensor.shape[-1])
            data, more = kquant.quantize(rows, actual, importance, kernel=work.recipe.kernel), {}
            if tokens:
                from stages.recipes.report import blocks_report

                more = blocks_report(work, work.mixture.layer(name), tensor, actual, data)
        work.writer.add_blocks(name, actual, data, tensor.shape)
        reports[name] = {"requested": wanted, "actual": actual, "shape": list(tensor.shape), "tokens": tokens,
                         "importance": importance is not None} | more
    return {"layers": reports, "transforms": folds.transforms if folds else []}
