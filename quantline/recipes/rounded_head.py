"""Whether safetensors can hold a model's output head in integers, as a recipe may ask."""

from quantline.config.recipes import GroupedRecipe, Recipe
from quantline.errors import Failure, StageError
from quantline.model.tensor_source import TensorSource


def head_misfit(name: str, recipe: Recipe, source: TensorSource) -> str | None:
    """Say why a head cannot be stored as a recipe asks; None if it can, or none is asked for.

    Args:
        name: Of the recipe.
        recipe: Its options.
        source: The unquantized model.
    """
    if not isinstance(recipe, GroupedRecipe) or not recipe.safetensors_head:
        return None
    head = source.arch.head
    if source.arch.tied:
        return (
            f"expected an output head of its own for safetensors_head, found {head}, which is the "
            "embedding too and is looked up in floats there; set "
            f"recipes.{name}.safetensors_head=false; ONNX and GGUF hold both in integers without it"
        )
    width = source.shape(head)[-1]
    if recipe.outside(width) is None:
        return (
            f"expected rows of {head} that groups divide for safetensors_head, found rows of "
            f"{width} weights with group_size: {recipe.group_size}; set "
            f"recipes.{name}.safetensors_head=false, or group_size=auto"
        )
    return None


def check_head(name: str, recipe: Recipe, source: TensorSource) -> None:
    """Refuse a recipe that asks for a head in integers where safetensors cannot hold it.

    Raises:
        StageError: unsupported_architecture.
    """
    problem = head_misfit(name, recipe, source)
    if problem:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, problem)
