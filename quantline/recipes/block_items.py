"""Quantizing the parts of a model by workers: the items, and what is done with them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantline.config.executor import Executor
from quantline.executor.item import Item, move_files
from quantline.executor.run_items import run_items
from quantline.recipes.context import QuantizationContext
from quantline.recipes.quantize_block import quantize_block
from quantline.recipes.shared_inputs import open_shared, shared_inputs


def quantize_by_workers(
    name: str, ctx: QuantizationContext, parts: Mapping[str, int | None], executor: Executor
) -> None:
    """Have workers quantize parts of a model into the folder of the context's writer.

    What lies outside all blocks is given out first: nothing else takes as long.

    Args:
        name: Of the recipe.
        ctx: What to quantize, and how.
        parts: Part → its block; None for what lies outside all blocks.
        executor: Who works.

    Raises:
        StageError: As `quantize_block` and `run_items` do.
    """
    shared = shared_inputs(name, ctx)
    items = []
    for part in sorted(parts, key=lambda part: parts[part] is not None):
        arguments = {"shared": shared, "part": part, "layer": parts[part]}
        items.append(Item(f"{part} of {name}", "quantize_part", arguments))

    def take(item: Item, folder: Path) -> None:
        part = item.arguments["part"]
        # The report comes last: with it the part is complete.
        move_files(folder, ctx.writer.folder, [f"{part}.safetensors", f"{part}.json"])

    run_items(executor, items, ctx.writer.folder, take, name, "block")


def quantize_part(shared: dict[str, Any], part: str, layer: int | None, folder: Path) -> None:
    """Quantize a part of the model into a folder, as a worker does it.

    Args:
        shared: From `shared_inputs`.
        part: What the store calls it.
        layer: The block; None is what lies outside all blocks.
        folder: For the result.

    Raises:
        StageError: As `open_shared` and `quantize_block` do.
    """
    ctx = open_shared(shared, folder)
    ctx.writer.close_part(part, quantize_block(ctx, layer))
