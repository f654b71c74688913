"""One option for each item at the least total cost within a size: a multiple-choice knapsack.

It is described in Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, chapter 11, and solved
by HiGHS (Huangfu and Hall 2018).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import LinearConstraint, linprog, milp
from scipy.sparse import csr_array

# Share of the least cost by which the choice may cost more: proving the last of it can take hours.
GAP = 1e-4


@dataclass(frozen=True)
class Option:
    """What an item can be.

    Attributes:
        name: Of the option.
        size: In bytes.
        cost: What it costs to take it.
    """

    name: str
    size: int
    cost: float


def smallest_size(items: Mapping[str, Sequence[Option]]) -> int:
    """Return the bytes that the smallest options take together."""
    return sum(min(option.size for option in options) for options in items.values())


def dominant_options(options: Sequence[Option]) -> list[Option]:
    """Return those that no other option beats in size and cost, by size."""
    dominant: list[Option] = []
    for option in sorted(options, key=lambda option: (option.size, option.cost, option.name)):
        if not dominant or option.cost < dominant[-1].cost:
            dominant.append(option)
    return dominant


def choose(items: Mapping[str, Sequence[Option]], limit: int) -> tuple[dict[str, Option], float]:
    """Choose an option for each item.

    Args:
        items: Item → its options.
        limit: Bytes that the options may take together.

    Returns:
        The option of each item, whose cost together is within GAP of the least there is; and the
        price of size, by how much the total cost falls with one more byte. That is the price in the
        relaxation in which items may be fractions of options, and 0 where the limit does not bind.

    Raises:
        ValueError: If a cost is not finite, or if not even the smallest options fit.
    """
    for options in items.values():
        if not all(np.isfinite(option.cost) for option in options):
            raise ValueError("expected finite costs, found NaN or infinity")
    dominant = {name: dominant_options(options) for name, options in sorted(items.items())}
    least = smallest_size(dominant)
    if least > limit:
        raise ValueError(f"expected a limit of at least {least} bytes, found {limit}")
    if not dominant:
        return {}, 0.0
    return _Program(dominant).solve(limit)


class _Program:
    """The knapsack as a linear program: one variable for each option, 1 if it is taken.

    Attributes:
        unit: Bytes that all sizes are multiples of.
        sizes: Of the options, in units, scaled to at most 1.
        costs: Of the options, scaled to at most 1.
        one_each: A row for each item, with a 1 for each of its options.
    """

    def __init__(self, items: dict[str, list[Option]]) -> None:
        self.items = items
        options = [option for item_options in items.values() for option in item_options]
        counts = [len(item_options) for item_options in items.values()]
        self.item_of_option = np.repeat(np.arange(len(items)), counts)
        self.unit = int(np.gcd.reduce([option.size for option in options], initial=0)) or 1
        sizes = np.array([option.size // self.unit for option in options], np.float64)
        self.largest_size = max(sizes.max(), 1.0)
        self.sizes = sizes / self.largest_size
        costs = np.array([option.cost for option in options])
        self.largest_cost = max(np.abs(costs).max(), np.finfo(float).tiny)
        self.costs = costs / self.largest_cost
        positions = (self.item_of_option, np.arange(len(options)))
        shape = (len(items), len(options))
        self.one_each = csr_array((np.ones(len(options)), positions), shape=shape)

    def solve(self, limit: int) -> tuple[dict[str, Option], float]:
        """Return what `choose` returns."""
        units = limit // self.unit
        price = self._price(units)
        while True:
            chosen = self._choose(units, limit)
            excess = sum(option.size for option in chosen.values()) - limit
            if excess <= 0:
                return chosen, price
            units -= -(-excess // self.unit)  # the solver's tolerance was more than a unit

    def _price(self, units: int) -> float:
        """Return by how much the cost of the relaxation falls with one more byte."""
        relaxed = linprog(
            self.costs,
            self.sizes[None],
            [units / self.largest_size],
            self.one_each,
            np.ones(len(self.items)),
            (0, 1),
            method="highs",
        )
        slope = -float(relaxed.ineqlin.marginals[0])
        return slope * self.largest_cost / self.largest_size / self.unit

    def _choose(self, units: int, limit: int) -> dict[str, Option]:
        """Return the best choice that the solver takes to fit so many units."""
        result = milp(
            self.costs,
            integrality=np.ones(len(self.costs)),
            bounds=(0, 1),
            options={"mip_rel_gap": GAP},
            constraints=[
                LinearConstraint(self.sizes[None], ub=units / self.largest_size),
                LinearConstraint(self.one_each, 1, 1),
            ],
        )
        if not result.success:
            raise ValueError(
                f"expected a choice within {limit} bytes, found none: {result.message}"
            )
        chosen = {}
        for number, (name, options) in enumerate(self.items.items()):
            taken = result.x[self.item_of_option == number]
            chosen[name] = options[int(taken.argmax())]
        return chosen
