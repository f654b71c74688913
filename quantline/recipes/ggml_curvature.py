"""kquant-curvature: tensors in ggml's blocks, rounded by the curvature, and the scales that go before it."""

from dataclasses import dataclass, field

import numpy as np
import torch

from quantline.model.gguf_checkpoint import Converted
from quantline.methods.ggml import (
    curvature as kquant_curvature,
    input_scales as kquant_inputs,
    mixes,
    quantize as kquant,
)
from quantline.methods.integer import awq
from quantline.methods.integer.curvature import divergence
from quantline.methods.ggml.block_types import dequantize
from quantline.methods.integer.grid import output_error
from quantline.recipes.input_scaling import divided
from quantline.recipes.layer_report import check_gain
from quantline.recipes.context import Work
from quantline.errors import Failure, StageError


@dataclass
class Folds:
    """The scales of a block: `columns` [in] multiply a module's weight, `rows` [out] divide it, `tensors` are what stands in
    the place of norms and biases.
    """

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    transforms: list[dict] = field(default_factory=list)

    def of(self, module: str, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(columns [in], rows [out]) of a module's weight; 1 where there are none."""
        return self.columns.get(module, np.ones(shape[1], np.float32)), self.rows.get(module, np.ones(shape[0], np.float32))


def fold(work: Work, layer: int | None) -> Folds:
    """AWQ's scales of a block, from its last input to its first, as a scale may divide the rows of a layer before.

    There are none outside of all blocks, where the recipe wants none, or in a converter's file, whose norms may not be the
    source's. A tensor that is kept in floats stays what it is in the source, and so does all that would have to be scaled
    with it.
    """
    folds = Folds()
    if layer is None or not work.recipe.scaling or isinstance(work.checkpoint, Converted):
        return folds
    for linears, before in reversed(work.facts.input_groups(layer)):
        kinds = {name: work.mixture.types(f"{name}.weight")[1] for name in linears}
        norm = before not in work.moments.layers
        if before is None or set(mixes.FLOATS) & {*kinds.values(), *([] if norm else [work.mixture.types(f"{before}.weight")[1]])}:
            continue
        weights = [work.checkpoint.tensor(f"{name}.weight") for name in linears]
        divisors = [folds.of(name, weight.shape)[1] for name, weight in zip(linears, weights, strict=True)]
        statistics = [work.moments.factors(name) for name in linears]
        scales, reach = kquant_inputs.search_scales(
            *([torch.from_numpy(one) for one in weights], list(kinds.values()), torch.from_numpy(work.moments.moment(linears[0]))),
            *([torch.from_numpy(one) for one in parts] for parts in (statistics, divisors)))
        scales = scales.numpy()
        folds.columns |= dict.fromkeys(linears, scales)
        folds.rows |= {} if norm else {before: scales}
        folds.tensors |= divided(work, before, scales, norm)
        folds.transforms.insert(0, {"step": "fold_scales", "into": before, "of": linears, "reach": reach})
    return folds


def in_file(work: Work, name: str, kind: str, folds: Folds) -> tuple[np.ndarray, dict]:
    """As `curved_blocks`, of a tensor whose rows a converter may have put into another order than the calibration knows.

    Raises StageError(unsupported_architecture) if they are not the checkpoint's rows.
    """
    module, tensor = work.mixture.layer(name), work.checkpoint.tensor(name)
    if not isinstance(work.checkpoint, Converted):
        return curved_blocks(work, module, tensor, kind, folds)
    order = work.checkpoint.row_order(name)
    if order is None:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected the rows of {module} in {name}, as curvature rounding "
                         "needs them, found other ones, which the converter made; take the method kquant")
    data, more = curved_blocks(work, module, tensor[np.argsort(order)], kind, folds)
    return data[order], more


def curved_blocks(work: Work, module: str, weight: np.ndarray, kind: str, folds: Folds) -> tuple[np.ndarray, dict]:
    """(ggml blocks of a weight [out, in] by kquant-curvature, what is told of them, held against ggml's own rounding)."""
    weight, moment, factors = (torch.from_numpy(one) for one in
                               (weight, work.moments.moment(module), work.moments.factors(module)))
    columns, rows = (torch.from_numpy(one) for one in folds.of(module, weight.shape))
    data, damping = kquant_curvature.quantize(
        (weight * columns / rows[:, None]).numpy(), kind, awq.scaled_moment(moment, columns).numpy(),
        awq.scaled_factors(factors, rows).numpy(), work.recipe.damping, work.recipe.rounds)
    plain, report = kquant.quantize(weight.numpy(), kind, moment.diagonal().numpy(), kernel="numba"), {"damping": damping}
    for what, stored in (("", torch.from_numpy(dequantize(data, kind)) * rows[:, None] / columns),
                         ("ggml_", torch.from_numpy(dequantize(plain, kind)))):
        report |= {f"{what}error": output_error(weight, stored, moment),
                   f"{what}divergence": divergence(stored - weight, moment, factors)}
    check_gain(module, report, "ggml")
    return data, report
