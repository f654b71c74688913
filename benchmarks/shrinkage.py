"""What it brings to shrink H towards its diagonal, by how much, on text of several kinds.

    python -m benchmarks.real_models smollm2-135m /tmp/smollm2
    python -m benchmarks.shrinkage /tmp/smollm2 --shares 0 0.2 0.5 --recipes gptq Q4_K_M

The model is calibrated once on news, and each recipe is measured with each share on other news, on
code and on dialogue; differences from the first share are of the same tokens. A recipe that is
named by a mix is curvature rounding in its types. Writes
benchmarks/results/shrinkage-<model>-<grid, or the given name>.json and prints the table.
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
from benchmarks.tables import number_table
from quantline.files import write_json

MIXES = ("Q4_K_M", "Q3_K_M", "Q2_K")
RECIPES = ("gptq", "gptq + curvature", "awq", "awq + gptq", "awq + gptq + curvature", *MIXES)


def options_of(recipe: str, grid: tuple[int, int], share: float) -> dict[str, Any]:
    """Return the options of a recipe with a share."""
    if recipe in MIXES:
        return {"method": "kquant-curvature", "mix": recipe, "shrinkage": share}
    return our_recipes(*grid)[recipe] | {"shrinkage": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="that benchmarks.real_models has made")
    parser.add_argument("--grid", type=int, nargs=2, default=[4, 64], help="bits and group size")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["gptq"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0, 0.1, 0.2, 0.35, 0.5])
    parser.add_argument(
        "--sequences", type=int, nargs=2, default=[64, 8], help="of calibration and of each text"
    )
    parser.add_argument("--name", help="of this run, in the name of the results")
    options = parser.parse_args()
    model = ModelUnderTest.of_folder(options.folder, tuple(options.sequences))
    grid = tuple(options.grid)
    name = f"{options.folder.resolve().name}-{options.name or f'w{grid[0]}g{grid[1]}'}"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        calibration = Path(temporary) / "calibration"
        calibrate(model.checkpoint, model.calibration, calibration, True)
        for recipe in options.recipes:
            first = torch.empty(0)
            for share in options.shares:
                with tempfile.TemporaryDirectory() as quantized:
                    options_now = options_of(recipe, grid, share)
                    times = model.quantize(options_now, calibration, Path(quantized))
                    with model.quantized_weights(Path(quantized)):
                        found = model.token_divergences()
                row = {"recipe": recipe, "share": share, **times}
                row["kld"] = model.figures(found)["texts"]
                if len(first):
                    row["over the first"] = model.figures(found - first)["texts"]
                else:
                    first = found
                rows.append(row)
                content = {
                    "model": model.name,
                    "grid": grid,
                    "calibration_tokens": int(model.calibration.size),
                    "evaluation_tokens": model.tokens_of,
                    "rows": rows,
                }
                write_json(RESULTS / f"shrinkage-{name}.json", content)
    cells = [
        [row["recipe"], f"{row['share']:g}", *(f"{one['kld']:.4f}" for one in row["kld"].values())]
        for row in rows
    ]
    Console().print(number_table(("recipe", "share", *TEXTS), cells))


if __name__ == "__main__":
    main()
