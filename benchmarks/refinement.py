"""What refinement brings, and what it takes: scales and norms tuned after rounding.

    python -m benchmarks.real_models smollm2-135m /tmp/smollm2
    python -m benchmarks.refinement /tmp/smollm2 --grids 4 64 --grids 2 64 --steps 16 32

The model is calibrated, and rounded by a recipe without refinement and with so many steps of it.
The divergence on other news, on code and on dialogue stands beside that on the calibration
sequences that no step has seen, before and after, and beside the seconds of the whole stage. Writes
benchmarks/results/refinement-<model>.json and prints the table.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.model_under_test import TEXTS, ModelUnderTest
from benchmarks.paths import RESULTS
from benchmarks.quality.our_recipes import our_recipes
from benchmarks.tables import number_table
from quantline.files import write_json
from quantline.quantized.store import QuantizedModel

RECIPES = ("gptq", "gptq + curvature", "awq + gptq + curvature")


def measure(
    model: ModelUnderTest, recipe: dict[str, Any], refine: dict[str, Any], calibration: Path
) -> dict[str, Any]:
    """Return the divergence of a model that is rounded by a recipe, and the seconds of that."""
    with tempfile.TemporaryDirectory() as folder:
        options = recipe | {"refine": refine, "embedding_bits": None}
        times = model.quantize(options, calibration, Path(folder))
        with model.quantized_weights(Path(folder)):
            found = model.figures(model.token_divergences())["texts"]
        return times | {"kld": found, "refine": QuantizedModel(folder).report.get("refine")}


def told(divergence: float | None) -> str:
    """Return a divergence for the table; None is one that is not finite."""
    return "not finite" if divergence is None else f"{divergence:.4f}"


def cells_of(row: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    held_out = row["refine"]
    return [
        f"{row['bits']} / {row['group_size']}",
        str(row["steps"]),
        *(f"{one['kld']:.4f} ± {one['se']:.4f}" for one in row["kld"].values()),
        "" if held_out is None else f"{held_out['kld_before']:.4f} → {told(held_out['kld_after'])}",
        f"{row['seconds']:.0f}",
    ]


def main() -> None:
    """Measure all grids and steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="that benchmarks.real_models has made")
    parser.add_argument(
        "--grids", type=int, nargs=2, action="append", help="bits and group size", required=True
    )
    parser.add_argument("--recipe", choices=RECIPES, default=RECIPES[-1])
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--sequences", type=int, nargs=2, default=[64, 8])
    parser.add_argument(
        "--calibration", type=Path, help="of the same model and tokens, if there is one"
    )
    options = parser.parse_args()
    model = ModelUnderTest.of_folder(options.folder, tuple(options.sequences))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        calibration = options.calibration or Path(temporary) / "calibration"
        if not options.calibration:
            model.calibrate(calibration, True)
        for bits, group_size in options.grids:
            recipe = our_recipes(bits, group_size)[options.recipe]
            for steps in (0, *options.steps):
                refine = {"steps": steps, "learning_rate": options.rate}
                row = {"bits": bits, "group_size": group_size, "recipe": options.recipe}
                row |= {"steps": steps, "rate": options.rate}
                rows.append(row | measure(model, recipe, refine, calibration))
                print(rows[-1], flush=True)
                content = {
                    "model": model.name,
                    "calibration_tokens": int(model.calibration.size),
                    "evaluation_tokens": model.tokens_of,
                    "rows": rows,
                }
                write_json(RESULTS / f"refinement-{model.name}.json", content)
    titles = ("bits / group", "steps", *TEXTS, "held-out calibration", "seconds")
    Console().print(number_table(titles, [cells_of(row) for row in rows]))


if __name__ == "__main__":
    main()
