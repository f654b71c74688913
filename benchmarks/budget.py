"""Recipes fitted to a size, beside the uniform recipes of that size; predictions beside results.

    python -m benchmarks.budget                                          # the demo model
    python -m benchmarks.budget --model /path --calibration a.txt --evaluation b.txt
    python -m benchmarks.budget --methods kquant --mixes Q4_K_M Q3_K_M --grids

Both recipes of a pair round by the same method, and the fitted one is at most as large. Divergence
is that of the dequantized weights; `±` of the difference is the standard error of the paired
difference, token by token. Writes benchmarks/results/budget-<model>.json and prints the table.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.model_under_test import ModelUnderTest, add_model_options, mean_and_error
from benchmarks.paths import RESULTS
from benchmarks.stopwatch import stopwatch
from benchmarks.tables import number_table
from quantline.calibration.store import CalibrationStore
from quantline.config.recipes import parse_recipe
from quantline.files import MIB, write_json
from quantline.quantized.store import QuantizedWriter
from quantline.recipes.budget.fit import fit
from quantline.recipes.budget.plan import load_plan
from quantline.recipes.context import QuantizationContext
from quantline.recipes.quantize import parts_of
from quantline.recipes.quantize_block import quantize_block

# What the results say of a choice, by the keys of the manifest's step.
CHOICE_KEYS = (
    "predicted",
    "predicted_without",
    "bytes",
    "fixed_bytes",
    "price_per_mib",
    "chosen",
)
# Name of a method of grouped integers → its options besides the grid.
GROUPED_METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "gptq-curvature": {"method": "gptq", "curvature": True},
    "awq": {"method": "awq"},
    "awq-gptq": {"method": "awq", "rounding": "gptq"},
}
TITLES = (
    "rounded by",
    "size of",
    "MiB",
    "uniform: KL divergence",
    "predicted",
    "fitted: KL divergence",
    "predicted",
    "ratio",
    "difference",
)


class Measurement(NamedTuple):
    """A recipe's row of the results, and its divergence at each token, float64 [tokens]."""

    row: dict[str, Any]
    divergences: torch.Tensor


def recipe_options(method: str, size: str) -> dict[str, Any]:
    """Return the options of a uniform recipe.

    Args:
        method: kquant, kquant-curvature, or a name in GROUPED_METHODS.
        size: A mix such as Q4_K_M, or a grid such as w4g128.
    """
    if method.startswith("kquant"):
        return {"method": method, "mix": size}
    bits, group_size = size.removeprefix("w").split("g")
    grid = {"bits": int(bits), "group_size": int(group_size), "symmetric": False}
    return GROUPED_METHODS[method] | grid


def measure(
    model: ModelUnderTest, options: dict[str, Any], calibration: Path, fitted: bool
) -> Measurement:
    """Quantize a model by one recipe and measure it.

    Args:
        model: What to quantize.
        options: Of the recipe, without a budget.
        calibration: The folder of a calibration with gradients.
        fitted: Whether each tensor's type or grid is chosen within the recipe's own size.
    """
    store = CalibrationStore(calibration)
    budgeted = parse_recipe(options | {"budget": {}})
    recipe = budgeted if fitted else parse_recipe(options)
    requested = {"name": "budget", **recipe.model_dump(mode="json")}
    source = model.checkpoint
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = QuantizedWriter(folder)
        with stopwatch() as choosing:
            given = QuantizationContext(recipe, source, source.arch, store, writer)
            ctx, steps = fit(given, requested, folder)
        with stopwatch() as rounding:
            for part, layer in parts_of(ctx.recipe, source.arch.layers).items():
                writer.close_part(part, quantize_block(ctx, layer))
            writer.close({})
        with model.quantized_weights(folder):
            divergences = model.token_divergences()
        row: dict[str, Any] = {
            "seconds_choosing": choosing["seconds"],
            "seconds_rounding": rounding["seconds"],
            **mean_and_error(divergences),
        }
        if fitted:
            row |= {key: steps[0][key] for key in CHOICE_KEYS}
        else:
            ctx = QuantizationContext(budgeted, source, source.arch, store, writer)
            row |= uniform_size(ctx, options)
    return Measurement(row, divergences)


def uniform_size(ctx: QuantizationContext, options: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of what a budget would choose for, and of all else, without the choice.

    Args:
        ctx: With the recipe and an empty budget.
        options: Of the recipe.
    """
    plan = load_plan(ctx, {"name": "uniform", **options})
    sizes = [plan.size(item, option) for item, option in plan.unbudgeted.items()]
    return {"bytes": sum(sizes), "fixed_bytes": plan.fixed_bytes}


def compare(model: ModelUnderTest, method: str, size: str, calibration: Path) -> dict[str, Any]:
    """Measure a uniform recipe and the one that is fitted to its size.

    Raises:
        SystemExit: If the fitted one is larger.
    """
    options = recipe_options(method, size)
    uniform = measure(model, options, calibration, fitted=False)
    fitted = measure(model, options, calibration, fitted=True)
    if not fitted.row["bytes"] <= uniform.row["bytes"]:
        raise SystemExit(
            f"expected at most {uniform.row['bytes']} bytes, found {fitted.row['bytes']}"
        )
    difference = mean_and_error(fitted.divergences - uniform.divergences)
    return {
        "method": method,
        "size": size,
        "uniform": uniform.row,
        "fitted": fitted.row,
        "ratio": fitted.row["kld"] / uniform.row["kld"],
        "difference": difference["kld"],
        "difference_se": difference["se"],
    }


def budget_table(rows: list[dict[str, Any]]) -> Table:
    """Return the table of what `compare` returned."""
    cells = []
    for row in rows:
        uniform = row["uniform"]
        fitted = row["fitted"]
        cells.append(
            [
                row["method"],
                row["size"],
                f"{(fitted['bytes'] + fitted['fixed_bytes']) / MIB:.3f}",
                f"{uniform['kld']:.6f} ± {uniform['se']:.6f}",
                f"{fitted['predicted_without']:.6f}",
                f"{fitted['kld']:.6f} ± {fitted['se']:.6f}",
                f"{fitted['predicted']:.6f}",
                f"{row['ratio']:.3f}",
                f"{row['difference']:+.6f} ± {row['difference_se']:.6f}",
            ]
        )
    return number_table(TITLES, cells)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser)
    methods = ["kquant", "kquant-curvature", "gptq", "awq-gptq"]
    parser.add_argument("--methods", nargs="+", default=methods)
    parser.add_argument("--mixes", nargs="*", default=["Q4_K_M", "Q3_K_M", "Q2_K"])
    parser.add_argument("--grids", nargs="*", default=["w4g128", "w3g128"])
    return parser.parse_args()


def main() -> None:
    """Measure every pair; results are written, and the table printed, after each."""
    options = parse_options()
    console = Console(width=160)
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    model = ModelUnderTest.of_options(options)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder) / "curvature"
        times = model.calibrate(calibration, gradients=True)
        for method in options.methods:
            for size in options.mixes if method.startswith("kquant") else options.grids:
                rows.append(compare(model, method, size, calibration))
                console.print(budget_table(rows))
                results = {
                    "model": model.name,
                    "calibration": options.calibration.name,
                    "evaluation": [path.name for path in options.evaluation],
                    "calibration_tokens": int(model.calibration.size),
                    "evaluation_tokens": int(model.evaluation.size),
                    "calibration_seconds": times,
                    "threads": threads,
                    "rows": rows,
                }
                write_json(RESULTS / f"budget-{model.name}.json", results)


if __name__ == "__main__":
    main()
