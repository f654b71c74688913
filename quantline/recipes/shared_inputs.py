"""What the workers of one recipe have in common: how they are told of it, and how they open it."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from quantline.calibration.store import CalibrationStore
from quantline.config.recipes import parse_recipe
from quantline.executor.agreement import check_agreement, digests
from quantline.files import as_json
from quantline.model.checkpoint import Checkpoint
from quantline.model.gguf_checkpoint import GgufCheckpoint
from quantline.model.tensor_source import TensorSource
from quantline.quantized.store import QuantizedWriter
from quantline.recipes.context import QuantizationContext
from quantline.recipes.inputs_key import inputs_key


def shared_inputs(name: str, ctx: QuantizationContext) -> dict[str, Any]:
    """Return what all items of a recipe have in common, as JSON.

    Args:
        name: Of the recipe.
        ctx: With what a budget chose, if that was done.
    """
    key = inputs_key(name, ctx.recipe, ctx.source, ctx.calibration)
    return {
        "name": name,
        "recipe": ctx.recipe.model_dump(mode="json"),
        "grids": ctx.grids,
        "model": str(ctx.source.folder),
        "converted": ctx.source.converted,
        "calibration": str(ctx.calibration.folder),
        "key": digests(key),
    }


def open_shared(shared: dict[str, Any], folder: Path) -> QuantizationContext:
    """Return the context of an item; what items have in common is read once by a worker.

    Args:
        shared: From `shared_inputs`.
        folder: Where its writer puts results.

    Raises:
        StageError: artifact_changed, if this machine does not see what the stage sees.
    """
    return replace(_opened(as_json(shared)), writer=QuantizedWriter(folder))


@lru_cache(maxsize=1)
def _opened(text: str) -> QuantizationContext:
    """Open model and calibration, and hold them against what the stage found."""
    shared = json.loads(text)
    recipe = parse_recipe(shared["recipe"])
    folder = Path(shared["model"])
    source: TensorSource = GgufCheckpoint(folder) if shared["converted"] else Checkpoint(folder)
    calibration = CalibrationStore(Path(shared["calibration"]))
    found = inputs_key(shared["name"], recipe, source, calibration)
    check_agreement(shared["key"], found)
    writer = QuantizedWriter(Path())
    return QuantizationContext(recipe, source, source.arch, calibration, writer, shared["grids"])
