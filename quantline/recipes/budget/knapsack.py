"""One option for each item at the least total cost within a limit of size: a multiple-choice knapsack, solved by HiGHS.

(Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, chapter 11; Huangfu and Hall 2018 for the solver.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import LinearConstraint, linprog, milp
from scipy.sparse import csr_array

GAP = 1e-4  # share of the least cost by which what is chosen may cost more: proving the last of it can take hours


@dataclass(frozen=True)
class Option:
    """What an item can be, its size in bytes, and what it costs."""

    what: str
    size: int
    cost: float


def dominant(options: Sequence[Option]) -> list[Option]:
    """Those that no other beats in size and cost, from the smallest to the largest."""
    left: list[Option] = []
    for one in sorted(options, key=lambda option: (option.size, option.cost, option.what)):
        if not left or one.cost < left[-1].cost:
            left.append(one)
    return left


def choose(items: dict[str, Sequence[Option]], limit: int) -> tuple[dict[str, Option], float]:
    """(the option of each item, the price of size: by how much the total cost falls with one more byte).

    The options' sizes together are at most `limit`. Their cost is within `GAP` of the least there is. The price is that
    of the relaxation in which items may be mixtures of options, 0 where the limit does not bind.
    Raises ValueError if a cost is not finite, or if not even the smallest options fit.
    """
    if not all(np.isfinite(one.cost) for options in items.values() for one in options):
        raise ValueError("expected finite costs, found NaN or infinity")
    left = {name: dominant(options) for name, options in sorted(items.items())}
    if smallest(left) > limit:
        raise ValueError(f"expected a limit of at least {smallest(left)} bytes, found {limit}")
    if not left:
        return {}, 0.0
    flat = [one for options in left.values() for one in options]
    owner = np.repeat(np.arange(len(left)), [len(options) for options in left.values()])
    unit = int(np.gcd.reduce([one.size for one in flat], initial=0)) or 1
    sizes = np.array([one.size // unit for one in flat], np.float64)
    costs = np.array([one.cost for one in flat])
    scale = max(np.abs(costs).max(), np.finfo(float).tiny)
    one_each = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(left), len(flat)))
    room, most = limit // unit, max(sizes.max(), 1.0)
    relaxed = linprog(costs / scale, sizes[None] / most, [room / most], one_each, np.ones(len(left)), (0, 1), method="highs")
    while True:
        found = milp(costs / scale, integrality=np.ones(len(flat)), bounds=(0, 1), options={"mip_rel_gap": GAP}, constraints=[
            LinearConstraint(sizes[None] / most, ub=room / most), LinearConstraint(one_each, 1, 1)])
        if not found.success:
            raise ValueError(f"expected a choice within {limit} bytes, found none: {found.message}")
        chosen = {name: options[int(found.x[owner == number].argmax())] for number, (name, options) in enumerate(left.items())}
        over = sum(one.size for one in chosen.values()) - limit
        if over <= 0:
            return chosen, -float(relaxed.ineqlin.marginals[0]) * scale / most / unit
        room -= -(-over // unit)  # the solver's tolerance was more than a unit


def smallest(items: dict[str, Sequence[Option]]) -> int:
    """The bytes that the smallest options take together."""
    return sum(min(one.size for one in options) for options in items.values())
