"""A variant: a recipe in a container, judged in a runtime."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from quantline.config.containers import CONTAINERS
from quantline.config.recipes import Recipe
from quantline.config.runtimes import RUNTIMES, runtimes_of
from quantline.config.section import Name, Section
from quantline.registry import Registry

DEFAULT_LAYOUT = "compressed-tensors"


def _known(registry: Registry) -> AfterValidator:
    """Return a validator of names that a registry has to have."""

    def check(name: str) -> str:
        if name not in registry:
            raise ValueError(registry.unknown(name))
        return name

    return AfterValidator(check)


FormatName = Annotated[str, _known(CONTAINERS)]
RuntimeName = Annotated[str, _known(RUNTIMES)]


class Variant(Section):
    """One deliverable: which recipe, in which container, measured in which runtime."""

    recipe: Name = Field(description="Name of the recipe.")
    format: FormatName = Field(description="The container; by default the recipe's own.")
    runtime: RuntimeName = Field(description="Where it is measured; by default the format's own.")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        default=None,
        description="Float type of unquantized weights; null is the checkpoint's. In safetensors "
        "a checkpoint of that type stays as it is, also where it keeps a few tensors in another.",
    )
    layout: str = Field(
        default=DEFAULT_LAYOUT, description="Layout of quantized layers in safetensors."
    )
    split_max_mib: int | None = Field(
        default=None, gt=0, description="Size of one GGUF file; a larger model lies in several."
    )
    tokenizer: Literal["exact", "report"] = Field(
        default="exact",
        description="Whether the bundle's tokenizer has to give the source's ids on every text "
        "that is tried (exact), or smoke.json lists the texts on which it does not (report): "
        "llama.cpp splits words of some families at combining marks.",
    )


def misfits(variant: Variant, recipes: Mapping[str, Recipe]) -> Iterator[str]:
    """Yield what does not fit together in a variant, as `.key: expected ..., found ...`."""
    container = CONTAINERS[variant.format]
    runtimes = runtimes_of(variant.format)
    if variant.runtime not in runtimes:
        served = " or ".join(runtimes)
        yield f".runtime: {variant.format} is served by {served}, found {variant.runtime}"
    recipe = recipes.get(variant.recipe)
    if recipe is None:
        names = ", ".join(sorted(recipes))
        yield f".recipe: no recipe {variant.recipe!r} in this suite; there are {names}"
        return
    if not container.can_carry(type(recipe)):
        yield (
            f".recipe: {variant.format} carries the methods {', '.join(container.methods())}; "
            f"recipe {variant.recipe} has {recipe.method}"
        )
    layouts = container.layouts or (DEFAULT_LAYOUT,)
    if variant.layout not in layouts:
        yield f".layout: {variant.format} has {' or '.join(layouts)}, found {variant.layout}"
    elif variant.layout != DEFAULT_LAYOUT and recipe.activations:
        yield f".layout: {recipe.method} needs {DEFAULT_LAYOUT}, found {variant.layout}"
    elif variant.layout != DEFAULT_LAYOUT and getattr(recipe, "safetensors_head", False):
        yield (
            f".layout: a head in integers (safetensors_head of {variant.recipe}) needs "
            f"{DEFAULT_LAYOUT}, found {variant.layout}"
        )
    if variant.split_max_mib and not container.splits:
        yield f".split_max_mib: {variant.format} is never split, found {variant.split_max_mib}"
    if variant.dtype and recipe.storage != "none":
        yield (
            f".dtype: only a variant whose recipe has method none has one; {variant.recipe} has "
            f"{recipe.method}"
        )
    elif variant.dtype not in (None, *container.dtypes):
        dtypes = " or ".join(container.dtypes)
        yield f".dtype: {variant.format} is exported in {dtypes}, found {variant.dtype}"
