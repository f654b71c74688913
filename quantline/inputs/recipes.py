"""Recipes against the model's layers: names in overrides, and widths that groups divide."""

from pathlib import Path

from quantline.config.ggml_recipes import GgmlRecipe
from quantline.config.recipes import GroupedRecipe, Recipe, largest_group
from quantline.errors import Failure, StageError
from quantline.model.checkpoint import Checkpoint
from quantline.recipes.rounded_head import head_misfit


def check_recipe(
    name: str, recipe: Recipe, checkpoint: Checkpoint, converter: str | None
) -> str | None:
    """Check a recipe against the names and shapes of a model's tensors.

    Args:
        name: Of the recipe.
        recipe: Its options.
        checkpoint: The model.
        converter: As in params.yaml: what may make the tensors of its GGUF files.

    Returns:
        What makes the recipe fail by itself, while the others go on; None if nothing does.

    Raises:
        StageError: config_invalid, for an override that matches no tensor; missing_file, for a file
            that is not there.
    """
    if isinstance(recipe, GgmlRecipe):
        _check_overrides(recipe, checkpoint, converter)
    problem = _misfit(recipe, name, checkpoint) or head_misfit(name, recipe, checkpoint)
    return f"recipes.{name} is going to fail, and the others go on: {problem}" if problem else None


def _check_overrides(recipe: GgmlRecipe, checkpoint: Checkpoint, converter: str | None) -> None:
    path = recipe.importance_path
    if path is not None and not Path(path).is_file():
        raise StageError(
            Failure.MISSING_FILE,
            f"expected an importance matrix at {path}, found no such file; correct importance_file",
        )
    if getattr(recipe, "overrides", None):
        from quantline.formats.gguf.source import has_own_table
        from quantline.recipes.tensor_types import check_overrides

        # The names in a converter's file are known once there is one.
        if converter is None or has_own_table(checkpoint, converter):
            check_overrides(recipe, checkpoint)


def _misfit(recipe: Recipe, name: str, checkpoint: Checkpoint) -> str | None:
    """Say which layers have rows that groups of the recipe's size do not divide."""
    if not isinstance(recipe, GroupedRecipe) or recipe.budget is not None:
        return None
    size = recipe.group_size
    if isinstance(size, str) or size <= 0:  # auto, or the whole row
        return None
    widths: dict[int, str] = {}
    for layer in checkpoint.arch.linears():
        if f"{layer}.weight" in checkpoint:
            widths.setdefault(checkpoint.shape(f"{layer}.weight")[-1], layer)
    odd = sorted(width for width in widths if width % size)
    if not odd:
        return None
    rows = ", ".join(str(width) for width in odd)
    return (
        f"groups of {size} do not divide rows of {rows} weights, such as those of "
        f"{widths[odd[0]]}; set recipes.{name}.group_size=auto, or {largest_group(widths)} for all "
        "layers"
    )
