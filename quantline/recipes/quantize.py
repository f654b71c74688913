"""Quantizing a whole model by one recipe: the library call of the stage `quantize`."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantline.calibration.store import CalibrationStore
from quantline.config.executor import Executor
from quantline.config.recipes import AUTO, Recipe
from quantline.errors import Failure, StageError
from quantline.files import versions
from quantline.model.architecture import Architecture
from quantline.model.tensor_source import TensorSource
from quantline.quantized.store import REST, QuantizedWriter, block_part
from quantline.recipes.baseline import BASELINES
from quantline.recipes.block_items import quantize_by_workers
from quantline.recipes.budget.fit import fit
from quantline.recipes.context import QuantizationContext
from quantline.recipes.fallback import check_some_layer, fallbacks
from quantline.recipes.grid_counts import describe_grids, grid_counts
from quantline.recipes.quantize_block import quantize_block
from quantline.recipes.refinement.check import check_refinement, refines
from quantline.recipes.refinement.leftovers import remove_leftovers
from quantline.recipes.rounded_head import check_head
from quantline.run.progress import progress


def parts_of(recipe: Recipe, blocks: int) -> dict[str, int | None]:
    """Return the parts in which a model is quantized.

    Args:
        recipe: How.
        blocks: The number of decoder blocks.

    Returns:
        Part → its block; None for what lies outside all blocks.
    """
    if recipe.storage == "none":
        return {}
    parts: dict[str, int | None] = {block_part(layer): layer for layer in range(blocks)}
    if recipe.rounds_outside:
        parts[REST] = None
    return parts


def quantize_model(
    name: str,
    recipe: Recipe,
    source: TensorSource,
    calibration: CalibrationStore,
    folder: Path,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Quantize a model into a folder, one block after another or several at once.

    Blocks that are in the folder already, from a run that was killed, are not quantized again.

    Args:
        name: Of the recipe.
        recipe: Its options.
        source: The unquantized model.
        calibration: Its statistics.
        folder: Where to write.
        executor: Whose workers quantize the blocks, if it has several; by default this process
            does. The result is the same.

    Returns:
        The report that quantized.json holds, without its list of contents.

    Raises:
        StageError: config_invalid for a budget that nothing fits in; worse_than_round_to_nearest;
            non_finite; unsupported_width; unsupported_architecture; as the method and the
            calibration do; as `check_refinement` and `run_items` do.
    """
    requested = {"name": name, **recipe.model_dump(mode="json")}
    writer = QuantizedWriter(folder)
    finished = writer.finished_report()
    if finished is not None:
        remove_leftovers(folder)
        return finished
    check_taken_apart(recipe, source.arch)
    check_head(name, recipe, source)
    check_refinement(name, recipe, source, calibration)
    given = QuantizationContext(recipe, source, source.arch, calibration, writer)
    ctx, transforms = fit(given, requested, folder, executor)
    layers: dict[str, Any] = {}
    outside: dict[str, Any] = {}
    parts = parts_of(recipe, source.arch.layers)
    missing = {part: layer for part, layer in parts.items() if writer.report_of(part) is None}
    if executor is not None and executor.divides:
        quantize_by_workers(name, ctx, missing, executor)
    else:
        for part, layer in progress(missing.items(), name, "block"):
            writer.close_part(part, quantize_block(ctx, layer))
    for part in parts:
        done = writer.report_of(part)
        assert done is not None, part
        layers |= done["layers"]
        outside |= done.get("outside", {})
        transforms += done["transforms"]
    check_some_layer(layers)
    if recipe.storage != "none":
        step = {"step": "quantize", **recipe.model_dump(mode="json")}
        chosen = grid_counts(layers) if AUTO in step.values() else {}
        transforms.append(step | ({"grids": chosen} if chosen else {}))
    refined = None
    if refines(recipe):
        from quantline.recipes.refinement.refine import refine

        refined = refine(ctx, name, folder)
        transforms.append({"step": "refine", **refined})
    report: dict[str, Any] = {
        "recipe": requested,
        "transforms": transforms,
        "calibration": calibration.provenance(),
        "experts": calibration.expert_figures() if recipe.uses_calibration else None,
        "versions": versions("torch", "gguf", "llama-cpp-python"),
    }
    if recipe.activations:
        report["activations"] = "dynamic"
    if recipe.storage == "ggml":
        report["tensors"] = layers
        report["importance"] = ctx.tensor_types.write_importance(folder)
    else:
        report["layers"] = layers
        report["outside"] = outside
    if refined is not None:
        report["refine"] = refined
    writer.close(report)
    remove_leftovers(folder)
    return report


def check_taken_apart(recipe: Recipe, arch: Architecture) -> None:
    """Refuse to round a model most of whose weights nobody would round.

    Args:
        recipe: What is wanted.
        arch: Of the model.

    Raises:
        StageError: unsupported_architecture, for experts in a form that quantline does not know.
    """
    unsplit = arch.structure.unsplit if arch.structure else ()
    if unsplit and recipe.storage not in ("none", "ggml"):
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected experts of {arch.model_type} in a form that quantline takes apart, found "
            f"{unsplit[0]} and {len(unsplit) - 1} more, which would stay as they are; use a "
            "recipe in ggml's types, or recipe none",
        )


class Summary(NamedTuple):
    """What a recipe did to the model's layers.

    Attributes:
        metrics: As MLflow gets them.
        text: In one line.
        fell_back: Layer → how it was rounded, where that is not as the recipe says.
    """

    metrics: dict[str, float]
    text: str
    fell_back: dict[str, str]


def summarize(report: dict[str, Any], recipe: Recipe) -> Summary:
    """Return how many layers were quantized, and how they compare with the recipe's baseline.

    Args:
        report: Of `quantize_model`.
        recipe: Whose baseline counts.
    """
    in_ggml = recipe.storage == "ggml"
    count = len(report["tensors" if in_ggml else "layers"])
    metrics: dict[str, float] = {"layers": count}
    text = f"{count} {'tensors' if in_ggml else 'layers'} rounded"
    fell_back = fallbacks(report["tensors" if in_ggml else "layers"])
    grids = grid_counts(report.get("layers", {}))
    if len(grids) > 1:
        text += f" in {describe_grids(grids)}"
    gain = layer_gain(report, recipe)
    if gain is not None:
        baseline = BASELINES[recipe.baseline]
        metrics |= {f"{baseline.measure}_over_{recipe.baseline}": gain, "fell_back": len(fell_back)}
        text += f", {baseline.measure_label} {gain:.2f} of {baseline.possessive}"
    if refined := report.get("refine"):
        known = ("kld_before", "kld_after")
        metrics |= {f"refine_{key}": refined[key] for key in known if refined[key] is not None}
        text += f", {describe_refinement(refined)}"
    if fell_back:
        name, how = next(iter(fell_back.items()))
        text += f", {len(fell_back)} otherwise, such as {name}: {how}"
    return Summary(metrics, text, fell_back)


def describe_refinement(refined: dict[str, Any]) -> str:
    """Return what came of a refinement in words.

    Args:
        refined: As the report has it.
    """
    before, after = refined["kld_before"], refined["kld_after"]
    found = "NaN" if after is None else f"{after:.4f}"
    if refined["kept"]:
        return f"{refined['steps']} steps of refinement, divergence {before:.4f} → {found}"
    return (
        f"{refined['steps']} steps of refinement not kept: divergence {before:.4f} without them, "
        f"{found} with them"
    )


def layer_gain(report: dict[str, Any], recipe: Recipe) -> float | None:
    """Return the mean over the layers of the recipe's figure as a share of its baseline's.

    Args:
        report: Of `quantize_model`.
        recipe: Whose baseline counts.

    Returns:
        None where no layer has such a figure. A layer whose baseline leaves no error counts as 1.
    """
    measure = BASELINES[recipe.baseline].measure
    layers = report["tensors" if recipe.storage == "ggml" else "layers"]
    shares = []
    for layer in layers.values():
        if "error" not in layer:
            continue
        plain = layer[f"{recipe.baseline}_{measure}"]
        shares.append(layer[measure] / plain if plain > 0 else 1.0)
    return float(np.mean(shares)) if shares else None
