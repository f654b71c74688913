"""Round the model's weights by one recipe, from the shared calibration.

    python -m stages.quantize gptq-w4g128     # → artifacts/quantized/gptq-w4g128/
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from stages.calibrate import CALIBRATION
from stages.checkpoints.architecture import Architecture, architecture
from stages.checkpoints.canonical import GroupedLinear, QuantizedWriter
from stages.checkpoints.moments import Moments
from stages.checkpoints.reader import Checkpoint
from stages.load import MODEL
from stages.tracking import Failure, StageError, StageRun, sha256_json, stage_run, versions

if TYPE_CHECKING:
    import torch

QUANTIZED = Path("artifacts/quantized")
ROUNDING = 1e-9  # share by which two sums of the same errors may differ


def rounded(name: str, recipe, weight: "torch.Tensor", moment: "torch.Tensor",
            factors: "torch.Tensor | None") -> tuple[GroupedLinear, float | None]:
    """(a weight [out, in] rounded by a recipe with its statistics, the damping if there was one)."""
    from stages.methods import awq, gptq, int8, rtn
    from stages.methods.grid import check_finite, check_width

    check_finite(name, weight)
    if recipe.method == "int8":
        return int8.quantize(weight), None
    grid = (recipe.bits, check_width(name, weight.shape[1], recipe.group_size), recipe.symmetric)
    weighted, damping = recipe.scales == "weighted", None
    if recipe.method == "gptq":
        linear, damping = gptq.quantize(weight, moment, *grid, recipe.act_order, recipe.damping, weighted)
    elif recipe.method == "awq" and recipe.rounding == "gptq":
        linear, damping = gptq.quantize(weight, moment, *grid, weighted=weighted)
    elif recipe.method == "awq" and weighted:
        linear = awq.quantize(weight, moment, *grid)
    else:
        linear = rtn.quantize(weight, *grid, moment.diagonal() if weighted else None)
    if factors is not None:
        from stages.methods import curvature

        linear = curvature.refine(linear, weight, moment, factors)
    return linear, damping


def layer_report(name: str, linear: GroupedLinear, weight: "torch.Tensor", stored: "torch.Tensor",
                 moment: "torch.Tensor", factors: "torch.Tensor | None", tokens: int, damping: float | None) -> dict:
    """What is told of a layer: the error of the weight as it is `stored` [out, in], held against round-to-nearest's.

    The error is tr(Δ H Δᵀ), and with the output factor also the divergence tr(G Δ H Δᵀ).
    Raises StageError(worse_than_round_to_nearest), also when an error is NaN.
    """
    import torch

    from stages.methods import rtn
    from stages.methods.grid import output_error

    naive = torch.from_numpy(rtn.quantize(weight, linear.bits, linear.group_size, linear.symmetric).dequantize())
    report = {"bits": linear.bits, "group_size": linear.group_size, "symmetric": linear.symmetric,
              "shape": list(linear.integers.shape), "tokens": tokens, "damping": damping,
              "error": output_error(weight, stored, moment), "rtn_error": output_error(weight, naive, moment)}
    if factors is not None:
        from stages.methods.curvature import divergence

        report |= {"divergence": divergence(stored - weight, moment, factors),
                   "rtn_divergence": divergence(naive - weight, moment, factors)}
    for what in ("error", "divergence") if factors is not None else ("error",):
        if not report[what] <= report[f"rtn_{what}"] * (1 + ROUNDING):
            raise StageError(Failure.WORSE_THAN_ROUND_TO_NEAREST, f"{name} has the {what} {report[what]:.4g}, more than "
                             f"round-to-nearest's {report[f'rtn_{what}']:.4g}; calibrate on more text, or use rtn")
    return report


def output_factors(recipe, moments: Moments, name: str) -> "torch.Tensor | None":
    """G of a layer where the recipe asks for curvature rounding."""
    import torch

    wanted = recipe.method != "int8" and recipe.curvature
    return torch.from_numpy(moments.factors(name)) if wanted else None


def integers_by_layer(recipe, checkpoint: Checkpoint, facts: Architecture, moments: Moments,
                      writer: QuantizedWriter) -> Iterator[tuple[str, dict]]:
    """rtn, gptq and int8: each linear layer on its own."""
    import torch

    for name in facts.linears():
        weight = torch.from_numpy(checkpoint.tensor(f"{name}.weight"))
        moment, factors = torch.from_numpy(moments.moment(name)), output_factors(recipe, moments, name)
        linear, damping = rounded(name, recipe, weight, moment, factors)
        writer.add_linear(name, linear)
        yield name, layer_report(name, linear, weight, torch.from_numpy(linear.dequantize()), moment, factors,
                                 moments.tokens(name), damping)


def integers_by_input(recipe, checkpoint: Checkpoint, facts: Architecture, moments: Moments, writer: QuantizedWriter,
                      transforms: list[dict]) -> Iterator[tuple[str, dict]]:
    """awq: the layers that share an input are scaled together; the scales go into what comes before them.

    Inputs are divided by the scales and weights multiplied, so the function stays the same. The layer before may be
    a linear layer of the same block (up before down): its rows change after its own scales were found, which leaves
    the error of its rounding, relative to its rows, as it was; so it is folded first and rounded last.
    """
    import torch

    from stages.methods import awq
    from stages.methods.grid import check_finite, check_width

    for layer in range(facts.layers):
        groups = facts.input_groups(layer)
        weights = {name: torch.from_numpy(checkpoint.tensor(f"{name}.weight")) for linears, _ in groups for name in linears}
        columns, rows = {}, {}
        for linears, before in groups:
            moment = torch.from_numpy(moments.moment(linears[0]))
            size = check_width(linears[0], len(moment), recipe.group_size)
            for name in linears:
                check_finite(name, weights[name])
            if before is None:
                columns |= dict.fromkeys(linears, torch.ones(len(moment)))
                continue
            scales, exponent = awq.search_scales([weights[name] for name in linears], moment, recipe.bits, size,
                                                 recipe.symmetric, recipe.grid)
            columns |= dict.fromkeys(linears, scales)
            transforms.append({"step": "fold_scales", "into": before, "of": linears, "exponent": exponent})
            if before in weights:
                rows[before] = scales
            else:
                writer.add_override(f"{before}.weight", checkpoint.tensor(f"{before}.weight") / scales.numpy())
        for linears, _ in groups:
            moment = torch.from_numpy(moments.moment(linears[0]))
            for name in linears:
                divide = rows.get(name, torch.ones(len(weights[name])))
                factors = output_factors(recipe, moments, name)
                linear, damping = rounded(
                    name, recipe, weights[name] * columns[name] / divide[:, None],
                    awq.scaled_moment(moment, columns[name]), awq.scaled_factors(factors, divide))
                writer.add_linear(name, linear)
                stored = torch.from_numpy(linear.dequantize()) * divide[:, None] / columns[name]
                yield name, layer_report(name, linear, weights[name], stored, moment, factors, moments.tokens(name), damping)


def ggml_blocks(recipe, checkpoint: Checkpoint, facts: Architecture, moments: Moments,
                writer: QuantizedWriter) -> Iterator[tuple[str, dict]]:
    """kquant: every tensor of the model, in the type that the mix and its width give it."""
    from stages.methods import kquant, mixes

    for name in checkpoint.names:
        role, layer, tensor = facts.role(name), facts.layer_index(name), checkpoint.tensor(name)
        wanted = mixes.requested_type(recipe.mix, role, layer, facts.layers, facts.tied, facts.heads // facts.kv_heads)
        if tensor.ndim == 1:
            wanted = "F32"
        actual = mixes.fit_width(wanted, tensor.shape[-1])
        module = name.removesuffix(".weight")
        importance, tokens = None, 0
        if recipe.importance and module in moments.layers and actual not in ("F32", "F16"):
            importance, tokens = np.diagonal(moments.moment(module)), moments.tokens(module)
        rows = kquant.quantize(np.atleast_2d(tensor), actual, importance)
        writer.add_blocks(name, actual, rows, tensor.shape)
        yield name, {"requested": wanted, "actual": actual, "shape": list(tensor.shape), "tokens": tokens,
                     "importance": importance is not None}


def quantize(run: StageRun) -> None:
    name, recipe = run.instance, run.params.recipes[run.instance]
    checkpoint, moments = Checkpoint(MODEL), Moments(CALIBRATION)
    facts = architecture(checkpoint)
    with run.output(QUANTIZED / name) as folder:
        writer, transforms = QuantizedWriter(folder), []
        if recipe.method == "none":
            layers = iter(())
        elif recipe.method == "kquant":
            layers = ggml_blocks(recipe, checkpoint, facts, moments, writer)
        elif recipe.method == "awq":
            layers = integers_by_input(recipe, checkpoint, facts, moments, writer, transforms)
        else:
            layers = integers_by_layer(recipe, checkpoint, facts, moments, writer)
        done = dict(tqdm(layers, desc=name, unit="layer", disable=None))
        if recipe.method != "none":
            transforms.append({"step": "quantize", **recipe.model_dump(mode="json")})
        report = {"recipe": {"name": name, **recipe.model_dump(mode="json")}, "transforms": transforms,
                  "calibration": moments.provenance(), "versions": versions("torch", "gguf", "llama-cpp-python"),
                  "tensors" if recipe.method == "kquant" else "layers": done}
        writer.close(report)
    errors = [(one["error"], one["rtn_error"]) for one in done.values() if "error" in one]
    gain = float(np.mean([ours / naive if naive > 0 else 1.0 for ours, naive in errors])) if errors else None
    run.track(key=f"recipe:{name}:{sha256_json(report)}", name=f"quantize {name}", params=report["recipe"],
              metrics={"layers": len(done)} | ({"error_over_rtn": gain, "fell_back": 0} if errors else {}),
              files=[QUANTIZED / name / "quantized.json"])
    told = f", output error {gain:.2f} of round-to-nearest's" if errors else ""
    run.finish(f"{len(done)} {'tensors' if recipe.method == 'kquant' else 'layers'} rounded{told}")


if __name__ == "__main__":
    with stage_run("quantize", sys.argv[1]) as this:
        quantize(this)
