"""All that a recipe's result depends on.

A killed run is continued, and a worker helps, only where all of it is the same.
"""

from pathlib import Path
from typing import Any

from quantline.calibration.store import CalibrationStore
from quantline.config.ggml_recipes import GgmlRecipe
from quantline.config.recipes import Recipe
from quantline.files import sha256_json, stamp, versions
from quantline.model.tensor_source import TensorSource
from quantline.run.code_digest import code_digest

PACKAGES = ("torch", "numpy", "numba", "gguf", "llama-cpp-python")


def inputs_key(
    name: str, recipe: Recipe, source: TensorSource, calibration: CalibrationStore
) -> dict[str, Any]:
    """Return what the result of `quantize_model` depends on.

    Hashing the statistics would take longer than most recipes, so size and time of change stand
    for their content.

    Args:
        name: Of the recipe.
        recipe: Its options.
        source: The unquantized model.
        calibration: Its statistics.

    Returns:
        A dict for JSON; a killed run is continued if an equal one lies beside what it left.
    """
    given = recipe.importance_path if isinstance(recipe, GgmlRecipe) else None
    importance = [Path(given)] if given and Path(given).is_file() else []
    return {
        "recipe": {"name": name, **recipe.model_dump(mode="json")},
        "calibration": sha256_json(calibration.info),
        "moments": stamp(calibration.folder.glob("*.safetensors")),
        "model": source.stamp(),
        "importance": stamp(importance),
        "versions": versions(*PACKAGES),
        "code": code_digest("quantize", recipe.implementation),
    }
