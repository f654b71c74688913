"""Round the model's weights by one recipe, from the shared calibration.

    python -m stages.quantize gptq-w4g128     # → artifacts/quantized/gptq-w4g128/
"""

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from stages.calibrate import CALIBRATION
from stages.checkpoints.architecture import Architecture, architecture
from stages.checkpoints.canonical import FloatLinear, GroupedLinear, QuantizedWriter
from stages.checkpoints.moments import Moments
from stages.checkpoints.reader import Checkpoint, stamp
from stages.config import AnyRecipe
from stages.load import MODEL
from stages.tracking import Failure, StageError, StageRun, sha256_file, sha256_json, stage_run, versions

if TYPE_CHECKING:
    import torch

    from stages.mixture import Mixture

QUANTIZED = Path("artifacts/quantized")
ROUNDING = 1e-9  # share by which two sums of the same errors may differ


def rounded(name: str, recipe: AnyRecipe, weight: "torch.Tensor", moment: "torch.Tensor",
            factors: "torch.Tensor | None") -> tuple[GroupedLinear | FloatLinear, float | None]:
    """(a weight [out, in] rounded by a recipe with its statistics, the damping if there was one)."""
    from stages.methods import awq, fp8, gptq, int8, rtn
    from stages.methods.grid import check_finite, check_width

    check_finite(name, weight)
    if recipe.method in ("int8", "smoothquant", "fp8"):
        return (fp8 if recipe.method == "fp8" else int8).quantize(weight), None
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
    if factors is not None and recipe.curvature:
        from stages.methods import curvature

        linear = curvature.refine(linear, weight, moment, factors)
    return linear, damping


def layer_report(name: str, linear: GroupedLinear | FloatLinear, weight: "torch.Tensor", stored: "torch.Tensor",
                 moment: "torch.Tensor", factors: "torch.Tensor | None", seen: dict, damping: float | None) -> dict:
    """What is told of a layer: the tokens that it has `seen`, and the error of the weight as it is `stored` [out, in], held
    against round-to-nearest's.

    The error is tr(Δ H Δᵀ), and with the output factor there is the divergence tr(G Δ H Δᵀ) too.
    """
    from stages.methods import fp8, rtn
    from stages.methods.grid import output_error

    plain = (fp8.quantize(weight) if isinstance(linear, FloatLinear) else
             rtn.quantize(weight, linear.bits, linear.group_size, linear.symmetric))
    naive = dense(plain, weight)
    report = {**linear.about(), "shape": list(weight.shape), **seen, "damping": damping,
              "error": output_error(weight, stored, moment), "rtn_error": output_error(weight, naive, moment)}
    if factors is not None:
        from stages.methods.curvature import divergence

        report |= {"divergence": divergence(stored - weight, moment, factors),
                   "rtn_divergence": divergence(naive - weight, moment, factors)}
    return report


def output_changes(work: "Work", name: str, scaled: "torch.Tensor", weight: "torch.Tensor", scales: "torch.Tensor") -> dict:
    """The mean squared change of a layer's output where inputs are rounded too, beside that without the scales [in]."""
    from stages.methods import int8, smoothquant

    sample = work.on_device(work.moments.sample(name))
    return {"output_change": smoothquant.output_change(weight, scaled, sample, scales),
            "rtn_output_change": smoothquant.output_change(weight, dense(int8.quantize(weight), weight), sample, scales**0)}


def check_gain(name: str, report: dict) -> None:
    """Raise StageError(worse_than_round_to_nearest) unless a layer's figure is at most round-to-nearest's; NaN is not.

    The figure is what the recipe minimizes. What lowers the divergence may well raise the error of outputs that the
    model's answer hardly depends on.
    """
    what = next(one for one in ("output_change", "divergence", "error") if one in report)
    if not report[what] <= report[f"rtn_{what}"] * (1 + ROUNDING):
        raise StageError(Failure.WORSE_THAN_ROUND_TO_NEAREST, f"{name} has the {what} {report[what]:.4g}, more than "
                         f"round-to-nearest's {report[f'rtn_{what}']:.4g}; calibrate on more text, or use rtn")


def dense(linear: GroupedLinear | FloatLinear, like: "torch.Tensor") -> "torch.Tensor":
    """The weight that a rounded layer stands for, on the device of another."""
    import torch

    return torch.from_numpy(linear.dequantize()).to(like.device)


@dataclass(frozen=True)
class Work:
    """What every method works with."""

    recipe: AnyRecipe
    checkpoint: Checkpoint
    facts: Architecture
    moments: Moments
    writer: QuantizedWriter

    @cached_property
    def mixture(self) -> "Mixture":
        """Of a kquant recipe: the type and the importance of each tensor."""
        from stages.mixture import Mixture

        return Mixture(self.recipe, self.checkpoint, self.facts, self.moments)

    def on_device(self, values: np.ndarray) -> "torch.Tensor":
        """A tensor where the rounding is done: on the GPU, if there is one."""
        import torch

        from stages.checkpoints.device import device

        return torch.from_numpy(values).to(device())

    def weight(self, name: str) -> "torch.Tensor":
        """W [out, in] of a layer."""
        return self.on_device(self.checkpoint.tensor(f"{name}.weight"))

    def factors(self, name: str) -> "torch.Tensor | None":
        """What a layer's outputs matter, as the recipe looks at it: G in blocks for curvature rounding, its diagonal
        [out, 1, 1] for awq if the calibration has it, else None.
        """
        if getattr(self.recipe, "curvature", False):
            return self.on_device(self.moments.factors(name))
        if self.recipe.method == "awq" and self.moments.info["curvature"]:
            return self.importance(name)[:, None, None]
        return None

    def importance(self, name: str) -> "torch.Tensor":
        """The diagonal of G, or 1 if the calibration has no gradients: how much each output matters, float32 [out]."""
        if not self.moments.info["curvature"]:
            return self.on_device(np.ones(self.checkpoint.shape(f"{name}.weight")[0], np.float32))
        return self.on_device(self.moments.importance(name))

    def moment(self, name: str) -> "torch.Tensor":
        """H of a layer."""
        return self.on_device(self.moments.moment(name))


def powers_of_two(work: "Work", name: str, weight: "torch.Tensor", scales: "torch.Tensor") -> "torch.Tensor":
    """Scales [in] of one layer, or their square roots, as powers of two; 1 where neither leaves less than no scaling."""
    import torch

    from stages.methods import int8, rtn, smoothquant
    from stages.methods.grid import row_errors

    recipe, plain = work.recipe, torch.ones_like(scales)

    def left(scales: "torch.Tensor") -> float:
        if recipe.method == "smoothquant":
            sample = work.on_device(work.moments.sample(name))
            return smoothquant.output_change(weight, dense(int8.quantize(weight * scales), weight), sample, scales)
        size = scales.numel() if recipe.group_size == -1 else recipe.group_size
        stored = dense(rtn.quantize(weight * scales, recipe.bits, size, recipe.symmetric), weight) / scales
        return float(row_errors(weight, stored, work.moment(name)) @ work.importance(name).double())

    candidates = [torch.exp2((scales.log2() * reach).round()) for reach in (1.0, 0.5)]
    return min([plain, *candidates], key=left)


def integers_by_layer(work: Work, layer: int) -> dict:
    """rtn, gptq, int8 and fp8: each linear layer of a block on its own."""
    reports = {}
    for name in work.facts.linears_of(layer):
        weight, moment, factors = work.weight(name), work.moment(name), work.factors(name)
        linear, damping = rounded(name, work.recipe, weight, moment, factors)
        work.writer.add_linear(name, linear)
        reports[name] = layer_report(name, linear, weight, dense(linear, weight), moment, factors,
                                     work.moments.seen(name), damping)
        check_gain(name, reports[name])
    return {"layers": reports, "transforms": []}


def integers_by_input(work: Work, layer: int) -> dict:
    """awq and smoothquant: the layers of a block that share an input are scaled together; the scales go into what comes before them.

    Inputs are divided by the scales and weights multiplied, so the function stays the same. What comes before may be
    a linear layer of the same block (up before down), whose rows are divided; so the search goes from the last group to
    the first, and where a layer does not bear that division, those after it stay unscaled. Rows of a layer that has no scales
    of its own to make up for it (an expert's up) are divided by powers of two, which no rounding notices.
    """
    import torch

    from stages.methods import awq, smoothquant
    from stages.methods.grid import check_finite, check_width

    recipe, groups, transforms, reports = work.recipe, work.facts.input_groups(layer), [], {}
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
            grid = (recipe.bits, check_width(linears[0], len(moment), recipe.group_size), recipe.symmetric, recipe.grid)
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
        divisor = columns[linears[0]].cpu().numpy()
        if before not in weights:
            offset = np.float32(work.facts.family.norm_offset)
            work.writer.add_override(f"{before}.weight", (work.checkpoint.tensor(f"{before}.weight") + offset) / divisor - offset)
        if f"{before}.bias" in work.checkpoint.files:
            work.writer.add_override(f"{before}.bias", work.checkpoint.tensor(f"{before}.bias") / divisor)
    for linears, _ in groups:
        moment = work.moment(linears[0])
        for name in linears:
            factors = work.factors(name)
            linear, damping = rounded(name, recipe, weights[name] * columns[name] / rows[name][:, None],
                                      awq.scaled_moment(moment, columns[name]), awq.scaled_factors(factors, rows[name]))
            work.writer.add_linear(name, linear)
            stored = dense(linear, weights[name]) * rows[name][:, None] / columns[name]
            reports[name] = layer_report(name, linear, weights[name], stored, moment, factors, work.moments.seen(name),
                                         damping)
            if recipe.method == "smoothquant":
                reports[name] |= output_changes(work, name, stored * columns[name], weights[name], columns[name])
            check_gain(name, reports[name])
    return {"layers": reports, "transforms": transforms}


def ggml_blocks(work: Work, layer: int | None) -> dict:
    """kquant: the tensors of a block, or those outside of all blocks, in the types that the mix and their widths give."""
    from stages.methods import kquant

    reports = {}
    for name in work.checkpoint.names:
        if work.facts.layer_index(name) != layer:
            continue
        tensor, (wanted, actual) = work.checkpoint.tensor(name), work.mixture.types(name)
        importance, tokens = work.mixture.importance(name, actual)
        work.writer.add_blocks(name, actual, kquant.quantize(np.atleast_2d(tensor), actual, importance), tensor.shape)
        reports[name] = {"requested": wanted, "actual": actual, "shape": list(tensor.shape), "tokens": tokens,
                         "importance": importance is not None}
    return {"layers": reports, "transforms": []}


def inputs_key(recipe: dict, moments: Moments, checkpoint: Checkpoint) -> dict:
    """What the result of a recipe depends on; a killed run goes on only if all of it is the same.

    Hashing the moments would take longer than most recipes, so they are told by size and time of change.
    """
    home = Path(__file__).parent
    code = [path for room in ("methods", "checkpoints", "formats") for path in (home / room).glob("*.py")]
    given = [path for path in (Path(recipe.get("importance_file") or "none"),) if path.is_file()]
    return {"recipe": recipe, "calibration": sha256_json(moments.info),
            "moments": stamp(moments.folder.glob("*.safetensors")), "model": checkpoint.stamp(), "importance": stamp(given),
            "versions": versions("torch", "numpy", "numba", "gguf", "llama-cpp-python"),
            "code": sha256_json({path.name: sha256_file(path) for path in [*code, Path(__file__), home / "mixture.py"]})}


def quantize(run: StageRun) -> None:
    name, recipe = run.instance, run.params.recipes[run.instance]
    checkpoint, moments = Checkpoint(MODEL), Moments(CALIBRATION)
    facts, asked = architecture(checkpoint), {"name": name, **recipe.model_dump(mode="json")}
    blocks = {f"block-{layer:03d}": layer for layer in range(facts.layers)}
    method, parts = {"none": (None, {}), "kquant": (ggml_blocks, blocks | {"rest": None}),
                     "awq": (integers_by_input, blocks), "smoothquant": (integers_by_input, blocks)}.get(recipe.method, (integers_by_layer, blocks))
    with run.resumable_output(QUANTIZED / name, inputs_key(asked, moments, checkpoint)) as folder:
        work, layers, transforms = Work(recipe, checkpoint, facts, moments, QuantizedWriter(folder)), {}, []
        for part, layer in tqdm(parts.items(), desc=name, unit="block", disable=None):
            done = work.writer.report_of(part)
            if done is None:
                done = method(work, layer)
                work.writer.close_part(part, done)
            layers |= done["layers"]
            transforms += done["transforms"]
        if method:
            transforms.append({"step": "quantize", **recipe.model_dump(mode="json")})
        activations = {"activations": "dynamic"} if recipe.method in ("smoothquant", "fp8") else {}
        report = {"recipe": asked, **activations, "transforms": transforms, "calibration": moments.provenance(),
                  "versions": versions("torch", "gguf", "llama-cpp-python"),
                  "tensors" if recipe.method == "kquant" else "layers": layers}
        if recipe.method == "kquant":
            report["importance"] = work.mixture.write_importance(folder)
        work.writer.close(report)
    errors = [(one["error"], one["rtn_error"]) for one in layers.values() if "error" in one]
    gain = float(np.mean([ours / naive if naive > 0 else 1.0 for ours, naive in errors])) if errors else None
    run.track(key=f"recipe:{name}:{sha256_json(report)}", name=f"quantize {name}", params=asked,
              metrics={"layers": len(layers)} | ({"error_over_rtn": gain, "fell_back": 0} if errors else {}),
              files=[QUANTIZED / name / "quantized.json"])
    told = f", output error {gain:.2f} of round-to-nearest's" if errors else ""
    run.finish(f"{len(layers)} {'tensors' if recipe.method == 'kquant' else 'layers'} rounded{told}")


if __name__ == "__main__":
    with stage_run("quantize", sys.argv[1]) as this:
        quantize(this)
