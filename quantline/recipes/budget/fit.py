"""Fitting a recipe to a budget: the model is as close to the source as a size allows.

First every tensor is rounded to everything that it could have, and what that costs is written
down, block by block (costs.py). Then a knapsack is solved (knapsack.py), and the recipe goes on
with what was chosen.
"""

from pathlib import Path
from typing import Any

from quantline.config.executor import Executor
from quantline.files import MIB, read_json, write_json
from quantline.recipes.budget.cost_items import costs_by_workers
from quantline.recipes.budget.knapsack import Option, choose, smallest_size
from quantline.recipes.budget.plan import item_bytes, load_plan, too_small
from quantline.recipes.context import QuantizationContext
from quantline.run.progress import progress


def fit(
    ctx: QuantizationContext,
    requested: dict[str, Any],
    folder: Path,
    executor: Executor | None = None,
) -> tuple[QuantizationContext, list[dict[str, Any]]]:
    """Choose what each tensor gets, if the recipe has a budget.

    Costs that an earlier run left in the folder are not computed again.

    Args:
        ctx: What to quantize, and how.
        requested: The recipe with its name, as the report says it.
        folder: Of the result; costs are kept there until the choice is made.
        executor: Whose workers compute the costs, if it has several; by default this process does.

    Returns:
        The context with the choice made, and the steps of the manifest.

    Raises:
        StageError: config_invalid, for a budget that nothing fits in; missing_file, for a
            calibration without what costs need; non_finite; and as the method does.
    """
    budget = ctx.recipe.size_budget
    if budget is None:
        return ctx, []
    from quantline.recipes.budget.costs import Costs

    plan = load_plan(ctx, requested)
    costs = Costs(ctx)
    cost_of: dict[str, dict[str, float]] = {}
    files: dict[Path, int | None] = {}
    for layer in [*range(ctx.arch.layers), None]:
        files[folder / f"costs-{'rest' if layer is None else f'{layer:03d}'}.json"] = layer
    missing = {path: layer for path, layer in files.items() if not path.is_file()}
    if executor is not None and executor.divides:
        costs_by_workers(ctx, requested, missing, folder, executor)
    else:
        for path, layer in progress(missing.items(), f"{requested['name']}, costs", "block"):
            write_json(path, plan.costs(costs, layer))
    for path in files:
        cost_of |= read_json(path)
    items = {}
    for item, names in plan.options.items():
        items[item] = [Option(name, plan.size(item, name), cost_of[item][name]) for name in names]
    limit = item_bytes(ctx, budget, plan)
    if smallest_size(items) > limit:
        raise too_small(ctx, budget, plan, smallest_size(items) - limit)
    choice, price = choose(items, limit)
    for path in folder.glob("costs-*.json"):
        path.unlink()
    step = {
        "step": "budget",
        **budget.model_dump(mode="json"),
        "unit": costs.unit,
        "rounding": plan.rounding,
        "bytes": sum(option.size for option in choice.values()),
        "limit_bytes": limit,
        "fixed_bytes": plan.fixed_bytes,
        "predicted": sum(option.cost for option in choice.values()),
        "price_per_mib": price * MIB,
        "chosen": {
            item: {"what": option.name, "cost": option.cost, "bytes": option.size}
            for item, option in choice.items()
        },
    }
    if all(plan.unbudgeted[item] in cost_of[item] for item in items):
        step["predicted_without"] = sum(cost_of[item][plan.unbudgeted[item]] for item in items)
    return plan.context_for({item: option.name for item, option in choice.items()}), [step]
