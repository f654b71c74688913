"""Whether a model can be refined by a calibration: what is refused, before any work."""

from collections import Counter

from quantline.calibration.embedding_and_head import calibration_tokens
from quantline.calibration.store import CalibrationStore
from quantline.config.recipes import GroupedRecipe, Recipe
from quantline.errors import Failure, StageError
from quantline.model.checkpoint import Checkpoint
from quantline.model.tensor_source import TensorSource


def refines(recipe: Recipe) -> bool:
    """Whether a recipe asks for refinement."""
    return isinstance(recipe, GroupedRecipe) and recipe.refine.steps > 0


def check_refinement(
    name: str, recipe: Recipe, source: TensorSource, calibration: CalibrationStore
) -> None:
    """Refuse a refinement that cannot be done, if a recipe asks for one.

    Args:
        name: Of the recipe.
        recipe: Its options.
        source: The unquantized model.
        calibration: Whose tokens the steps see.

    Raises:
        StageError: missing_file, for a calibration without its tokens; config_invalid, for too few
            of them; unsupported_architecture, for a model whose layers do not run as they are
            rounded.
    """
    if not isinstance(recipe, GroupedRecipe) or not refines(recipe):
        return
    misfit = recipe.refine.misfit(len(calibration_tokens(calibration.folder)))
    if misfit:
        raise StageError(Failure.CONFIG_INVALID, f"recipes.{name}.refine: {misfit}")
    problem = _problem_of_model(source)
    if problem:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected layers that gradients reach for recipes.{name}.refine, found {problem}; set "
            f"recipes.{name}.refine.steps=0",
        )


def _problem_of_model(source: TensorSource) -> str | None:
    """Say why gradients of rounded layers cannot be had one block after the other, if so."""
    from quantline.model.block_model import BlockModel

    if not isinstance(source, Checkpoint):
        return "a model that is read from a converter's file"
    parts = BlockModel(source)
    uses = Counter(parts.names.values())
    for block in range(parts.arch.layers):
        own = parts.linears(block)
        for layer in parts.arch.linears_of(block):
            if layer not in own:
                return f"{layer}, which is no linear layer of block {block}"
            if uses[f"{layer}.weight"] > 1:
                return f"{layer}, which the model has in several places"
    return None
