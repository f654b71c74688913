"""Computing by workers what a budget can choose from: the items, and what is done with them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantline.config.executor import Executor
from quantline.executor.item import Item
from quantline.executor.run_items import run_items
from quantline.files import write_json
from quantline.recipes.budget.plan import load_plan
from quantline.recipes.context import QuantizationContext
from quantline.recipes.shared_inputs import open_shared, shared_inputs

COSTS = "costs.json"


def costs_by_workers(
    ctx: QuantizationContext,
    requested: dict[str, Any],
    missing: Mapping[Path, int | None],
    folder: Path,
    executor: Executor,
) -> None:
    """Have workers write the costs of some parts of a model.

    Args:
        ctx: What to quantize, and how.
        requested: The recipe with its name, as the report says it.
        missing: File to write → the block; None for what lies outside all blocks.
        folder: Of the result.
        executor: Who works.

    Raises:
        StageError: As `Plan.costs` and `run_items` do.
    """
    name = requested["name"]
    shared = shared_inputs(name, ctx)
    targets = {}
    items = []
    for path in sorted(missing, key=lambda path: missing[path] is not None):
        layer = missing[path]
        where = "what lies outside all blocks" if layer is None else f"block {layer}"
        arguments = {"shared": shared, "requested": requested, "layer": layer}
        item = Item(f"the costs of {where} in {name}", "part_costs", arguments)
        items.append(item)
        targets[item.id] = path

    def take(item: Item, made: Path) -> None:
        os.rename(made / COSTS, targets[item.id])

    run_items(executor, items, folder, take, f"{name}, costs", "block")


def part_costs(
    shared: dict[str, Any], requested: dict[str, Any], layer: int | None, folder: Path
) -> None:
    """Write the costs of a part of the model into a folder, as a worker does it.

    Args:
        shared: From `shared_inputs`.
        requested: The recipe with its name, as the report says it.
        layer: The block; None is what lies outside all blocks.
        folder: For the result.

    Raises:
        StageError: As `open_shared` and `Plan.costs` do.
    """
    from quantline.recipes.budget.costs import Costs

    ctx = open_shared(shared, folder)
    plan = load_plan(ctx, requested)
    write_json(folder / COSTS, plan.costs(Costs(ctx), layer))
