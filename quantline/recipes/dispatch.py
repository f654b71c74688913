"""What a recipe makes of one block of the model: methods see one weight, and here it is decided which, and with what."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantline.recipes.context import Work

MODULES = {"kquant": "ggml", "kquant-curvature": "ggml", "awq": "input_scaling", "smoothquant": "input_scaling"}  # of others: layers
# What a rounding is held against: in words, and the method that makes it.
PLAIN = {"rtn": ("round-to-nearest's", "rtn"), "ggml": ("ggml's own rounding's", "kquant")}


def round_block(work: "Work", layer: int | None) -> dict:
    """{layers: what is told of each, transforms}; what is rounded goes to the work's writer.

    `layer` None is what lies outside of all blocks, which only ggml's types round.
    """
    return import_module(f"quantline.recipes.{MODULES.get(work.recipe.method, 'layerwise')}").round_block(work, layer)
