"""Fit to a budget: what each tensor gets is chosen by what it costs, so that the whole is as close as a size allows.

First every tensor is rounded to everything that it could have, and what that costs is written down, block by block
(costs.py). Then a knapsack is solved (methods/knapsack.py), and the recipe goes on with what was chosen.
"""

from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from quantline.model.checkpoint import read_json
from quantline.recipes.budget.knapsack import Option, choose, smallest
from quantline.recipes.dispatch import MODULES
from quantline.recipes.budget.costs import Costs
from quantline.recipes.context import Work
from quantline.errors import Failure, StageError
from quantline.files import write_json

MIB = 2**20


class Plan(Protocol):
    """What can be chosen, for one kind of recipe. Sizes are bytes.

    `items`: name → what it can be; `before`: name → what the recipe without a budget makes it. `tensors` is the size of
    all tensors that are no items, `around` what the file holds besides tensors, and `more` by how much that is more than
    without a budget.
    """

    rounding: str  # by which the costs are
    items: dict[str, list[str]]
    before: dict[str, str]
    tensors: int
    around: int
    more: int

    def size(self, item: str, what: str) -> int: ...

    def costs(self, costs: Costs, layer: int | None) -> dict[str, dict[str, float]]:
        """Item → what it could be → cost, of the items of a block, or of those outside of all blocks."""

    def chosen(self, choice: dict[str, str]) -> Work:
        """The work of a recipe that makes what was chosen."""


def fit(work: Work, asked: dict, folder: Path) -> tuple[Work, list[dict]]:
    """(the work with the choice made, what is told of it among the transforms). Costs that an earlier run has left in the
    folder are not worked out again.

    Raises StageError: config_invalid for a budget that nothing fits in, missing_file, non_finite, and what rounding raises.
    """
    if getattr(work.recipe, "budget", None) is None:
        return work, []
    plan, costs, found = plan_of(work, asked), Costs(work), {}
    for layer in tqdm([*range(work.facts.layers), None], desc=f"{asked['name']}, costs", unit="block", disable=None):
        path = folder / f"costs-{'rest' if layer is None else f'{layer:03d}'}.json"
        if not path.is_file():
            write_json(path, plan.costs(costs, layer))
        found |= read_json(path)
    items = {name: [Option(what, plan.size(name, what), found[name][what]) for what in options]
             for name, options in plan.items.items()}
    room = room_of(work, plan)
    if smallest(items) > room:
        raise StageError(Failure.CONFIG_INVALID, too_small(work, plan, smallest(items) - room))
    choice, price = choose(items, room)
    for path in folder.glob("costs-*.json"):
        path.unlink()
    told = {"step": "budget", **work.recipe.budget.model_dump(mode="json"), "unit": costs.unit, "rounding": plan.rounding,
            "bytes": sum(one.size for one in choice.values()), "limit_bytes": room, "fixed_bytes": plan.tensors,
            "predicted": sum(one.cost for one in choice.values()), "price_per_mib": price * MIB,
            "chosen": {name: {"what": one.what, "cost": one.cost, "bytes": one.size} for name, one in choice.items()}}
    if all(plan.before[name] in found[name] for name in items):
        told["predicted_without"] = sum(found[name][plan.before[name]] for name in items)
    return plan.chosen({name: one.what for name, one in choice.items()}), [told]


def plan_of(work: Work, asked: dict) -> Plan:
    """The plan for the recipe's method."""
    if MODULES.get(work.recipe.method) == "ggml":
        from quantline.recipes.budget.ggml_types import Types

        return Types(work, asked)
    from quantline.recipes.budget.grids import Grids

    return Grids(work)


def room_of(work: Work, plan: Plan) -> int:
    """The bytes that all items together may take."""
    budget = work.recipe.budget
    if budget.size_mib is not None:
        return int(budget.size_mib * MIB) - plan.tensors - plan.around
    if budget.bits_per_weight is not None:
        return int(budget.bits_per_weight * weights(work) / 8) - plan.tensors
    return sum(plan.size(name, what) for name, what in plan.before.items()) - plan.more


def weights(work: Work) -> int:
    """How many weights the model has."""
    total = 0
    for name in work.checkpoint.names:
        count = 1
        for length in work.checkpoint.shape(name):
            count *= length
        total += count
    return total


def too_small(work: Work, plan: Plan, lacking: int) -> str:
    """What is said of a budget that lacks so many bytes, in its own unit."""
    budget = work.recipe.budget
    if budget.bits_per_weight is not None:
        what, found, least = "bits_per_weight", budget.bits_per_weight, budget.bits_per_weight + 8 * lacking / weights(work)
    elif budget.size_mib is not None:
        what, found, least = "size_mib", budget.size_mib, budget.size_mib + lacking / MIB
    else:
        what, found = "size_mib", (room_of(work, plan) + plan.tensors + plan.around) / MIB
        least = found + lacking / MIB
    return (f"expected a budget of at least {what}: {least + 5e-4:.3f}, which the smallest of all choices need, "
            f"found {found:.3f}; raise it, or allow smaller ones")
