"""What it brings that tokens count by their gradients in the second moments of inputs.

    python -m benchmarks.real_models smollm2-135m /tmp/smollm2
    python -m benchmarks.weights /tmp/smollm2

The model is calibrated twice on the same tokens, and each recipe is measured with both on news, of
which the calibration had the other half, on code and on dialogue. Writes
benchmarks/results/weights-<model>.json and prints the table.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.calibration import calibrate
from benchmarks.model_under_test import TEXTS, ModelUnderTest
from benchmarks.paths import RESULTS
from benchmarks.quality.our_recipes import our_recipes
from benchmarks.stopwatch import stopwatch
from benchmarks.tables import number_table
from quantline.files import write_json

RECIPES = ("gptq", "gptq + curvature", "awq", "awq + gptq", "awq + gptq + curvature")


def measure(
    model: ModelUnderTest, grid: tuple[int, int], recipes: list[str], path: Path
) -> list[dict[str, Any]]:
    """Return one row for each recipe and way of counting; the file is renewed with each."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for weights in ("equal", "gradient"):
            calibration = Path(name) / weights
            with stopwatch() as times:
                weighted = weights == "gradient"
                calibrate(model.checkpoint, model.calibration, calibration, True, weighted)
            rows.append({"weights": weights, "recipe": "calibration", **times})
        for recipe in recipes:
            equal = torch.empty(0)
            for weights in ("equal", "gradient"):
                quantized = Path(name) / f"{recipe} {weights}"
                quantized.mkdir()
                options = our_recipes(*grid)[recipe]
                times = model.quantize(options, Path(name) / weights, quantized)
                with model.quantized_weights(quantized):
                    found = model.token_divergences()
                row = {"weights": weights, "recipe": recipe, **times}
                row["kld"] = model.figures(found)["texts"]
                if weights == "equal":
                    equal = found
                else:
                    row["over equal"] = model.figures(found - equal)["texts"]
                rows.append(row)
                write_json(path, report(model, grid, rows))
    return rows


def report(
    model: ModelUnderTest, grid: tuple[int, int], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the content of the file."""
    return {
        "model": model.name,
        "bits": grid[0],
        "group_size": grid[1],
        "calibration_tokens": int(model.calibration.size),
        "evaluation_tokens": model.tokens_of,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="that benchmarks.real_models has made")
    parser.add_argument("--grid", type=int, nargs=2, default=[4, 64], help="bits and group size")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument(
        "--sequences", type=int, nargs=2, default=[64, 32], help="of calibration and of each text"
    )
    options = parser.parse_args()
    model = ModelUnderTest.of_folder(options.folder, tuple(options.sequences))
    grid = tuple(options.grid)
    name = options.folder.resolve().name
    path = RESULTS / f"weights-{name}-w{grid[0]}g{grid[1]}-{model.calibration.size}.json"
    rows = measure(model, grid, list(options.recipes), path)
    cells = [
        [row["recipe"], row["weights"], *(f"{one['kld']:.4f}" for one in row["kld"].values())]
        for row in rows
        if "kld" in row
    ]
    Console().print(number_table(("recipe", "tokens count", *TEXTS), cells))


if __name__ == "__main__":
    main()
