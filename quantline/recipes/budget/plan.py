"""What a budget can choose from, by the kind of tensor that a recipe makes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

from quantline.config.recipes import Budget
from quantline.errors import Failure, StageError
from quantline.files import MIB
from quantline.recipes.context import QuantizationContext
from quantline.registry import load_object

if TYPE_CHECKING:
    from quantline.recipes.budget.costs import Costs

# Recipe.storage → the class of its plan, which is imported when it is used.
PLANS = {
    "ggml": "quantline.recipes.budget.ggml_types:TypePlan",
    "grouped": "quantline.recipes.budget.grids:GridPlan",
}


class Plan(Protocol):
    """What can be chosen for one kind of recipe. Sizes are bytes.

    Life cycle (see fit.py):

        plan = load_plan(ctx, requested)
        costs = plan.costs(costs, layer)             # for every block, and once for the rest
        size = plan.size(item, option)               # for every item and option
        ctx = plan.context_for({item: option, …})    # goes on with the recipe

    Attributes:
        rounding: How tensors are rounded for the costs, in words.
        options: Item → the names of its options.
        unbudgeted: Item → the option that the recipe without a budget takes.
        fixed_bytes: Of all tensors that are no items.
        overhead_bytes: Of what the file holds besides tensors.
        extra_overhead_bytes: By how much that is more than without a budget.
    """

    rounding: str
    options: dict[str, list[str]]
    unbudgeted: dict[str, str]
    fixed_bytes: int
    overhead_bytes: int
    extra_overhead_bytes: int

    def size(self, item: str, option: str) -> int:
        """Return the bytes of an item."""

    def costs(self, costs: "Costs", layer: int | None) -> dict[str, dict[str, float]]:
        """Return item → option → cost, of the items of a block; of None, those outside blocks."""

    def context_for(self, choice: dict[str, str]) -> QuantizationContext:
        """Return the context of a recipe that takes the chosen option of each item."""


def load_plan(ctx: QuantizationContext, requested: dict[str, Any]) -> Plan:
    """Return the plan for a recipe.

    Args:
        ctx: With the recipe and its budget.
        requested: The recipe with its name, as the report says it.

    Raises:
        StageError: config_invalid, for a kind of tensor that budgets do not know;
            unsupported_width, if no option fits a layer.
    """
    storage = ctx.recipe.storage
    if storage not in PLANS:
        raise StageError(
            Failure.CONFIG_INVALID,
            f"expected a method whose tensors are {' or '.join(PLANS)} for a budget, found "
            f"{ctx.recipe.method}, whose are {storage}; take another method, or no budget",
        )
    plan_class = cast(Callable[..., Plan], load_object(PLANS[storage]))
    return plan_class(ctx, requested)


def item_bytes(ctx: QuantizationContext, budget: Budget, plan: Plan) -> int:
    """Return the bytes that all items together may take within a budget."""
    if budget.size_mib is not None:
        return int(budget.size_mib * MIB) - plan.fixed_bytes - plan.overhead_bytes
    if budget.bits_per_weight is not None:
        return int(budget.bits_per_weight * count_weights(ctx) / 8) - plan.fixed_bytes
    unbudgeted = sum(plan.size(item, option) for item, option in plan.unbudgeted.items())
    return unbudgeted - plan.extra_overhead_bytes


def count_weights(ctx: QuantizationContext) -> int:
    """Return how many numbers the tensors of the model have."""
    total = 0
    for name in ctx.source.names:
        count = 1
        for length in ctx.source.shape(name):
            count *= length
        total += count
    return total


def too_small(ctx: QuantizationContext, budget: Budget, plan: Plan, lacking: int) -> StageError:
    """Return the error for a budget that lacks so many bytes, in its own unit."""
    if budget.bits_per_weight is not None:
        limit = "bits_per_weight"
        given = budget.bits_per_weight
        least = given + 8 * lacking / count_weights(ctx)
    elif budget.size_mib is not None:
        limit = "size_mib"
        given = budget.size_mib
        least = given + lacking / MIB
    else:
        limit = "size_mib"
        given = item_bytes(ctx, budget, plan) + plan.fixed_bytes + plan.overhead_bytes
        given = given / MIB
        least = given + lacking / MIB
    return StageError(
        Failure.CONFIG_INVALID,
        f"expected a budget of at least {limit}: {least + 5e-4:.3f}, which the smallest of all "
        f"choices need, found {given:.3f}; raise it, or allow smaller ones",
    )
