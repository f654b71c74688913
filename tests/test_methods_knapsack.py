"""The knapsack: what is chosen fits, and costs no more than the best of all choices, which small cases can try out."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantline.recipes.budget.knapsack import GAP, Option, choose, dominant, smallest

COST = st.floats(1e-9, 1.0)
OPTIONS = st.lists(st.tuples(st.integers(0, 40), COST), min_size=1, max_size=4)


def items_of(drawn: list[list[tuple[int, float]]], unit: int = 1) -> dict[str, list[Option]]:
    return {f"item-{number}": [Option(f"{index}", size * unit, cost) for index, (size, cost) in enumerate(options)]
            for number, options in enumerate(drawn)}


def cost(options) -> float:
    return sum(one.cost for one in options)


def size(options) -> int:
    return sum(one.size for one in options)


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.floats(0, 1), st.sampled_from([1, 144, 2**20 + 1]))
def test_no_choice_that_fits_costs_less(drawn, share, unit):
    items = items_of(drawn, unit)
    least = smallest(items)
    limit = least + int(share * (sum(max(one.size for one in options) for options in items.values()) - least))
    chosen, price = choose(items, limit)
    best = min(cost(one) for one in product(*items.values()) if size(one) <= limit)
    assert list(chosen) == sorted(items) and all(one in items[name] for name, one in chosen.items())
    assert size(chosen.values()) <= limit and price >= 0
    assert cost(chosen.values()) <= best * (1 + GAP) + 1e-12


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.floats(0, 1))
def test_the_order_of_items_and_options_does_not_matter(drawn, share):
    items = items_of(drawn)
    limit = smallest(items) + int(40 * share)
    turned = {name: options[::-1] for name, options in reversed(items.items())}
    assert choose(turned, limit) == choose(items, limit) == choose(items, limit)


@given(OPTIONS)
def test_dominant_options_are_those_that_no_other_beats(drawn):
    options = items_of([drawn])["item-0"]
    left = dominant(options)
    assert all(a.size < b.size and a.cost > b.cost for a, b in pairwise(left))
    assert all(any(one.size <= other.size and one.cost <= other.cost for one in left) for other in options)


@pytest.mark.parametrize(("limit", "price"), [(5, 0.1), (9, 0.1), (10, 0.0), (20, 0.0)])
def test_the_price_is_what_another_byte_is_worth(limit, price):
    chosen, found = choose({"one": [Option("small", 0, 1.0), Option("large", 10, 0.0)]}, limit)
    assert found == pytest.approx(price, abs=1e-9) and chosen["one"].what == ("large" if limit >= 10 else "small")


def test_a_model_of_many_tensors_is_chosen_for_within_seconds():
    draw = np.random.default_rng(0)
    items = {}
    for number in range(400):
        worth, weights = np.exp(draw.normal(size=1)[0] * 3), int(draw.integers(1, 64)) * 2**16
        items[f"{number:03d}"] = [Option(f"{bits}", weights * bits // 8, worth * weights * 4.0**-bits) for bits in (2, 3, 4, 5, 6, 8)]
    limit = sum(options[2].size for options in items.values())
    chosen, price = choose(items, limit)
    assert limit * 0.999 < size(chosen.values()) <= limit and price > 0
    assert cost(chosen.values()) < 0.3 * sum(options[2].cost for options in items.values())


def test_a_limit_below_the_smallest_is_refused():
    items = items_of([[(3, 1.0), (5, 0.5)], [(4, 1.0)]])
    assert size(choose(items, 7)[0].values()) == 7
    with pytest.raises(ValueError, match="a limit of at least 7 bytes, found 6"):
        choose(items, 6)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_costs_that_are_not_finite_are_refused(wrong):
    with pytest.raises(ValueError, match="finite costs"):
        choose({"one": [Option("a", 1, wrong)]}, 1)


def test_an_excess_that_the_solver_tolerates_is_no_choice():
    """One part in a billion is within HiGHS' tolerance, but not within the limit."""
    items = {f"{number}": [Option("small", 1, 1.0), Option("large", 10**9 + 1, 0.0)] for number in range(3)}
    chosen, _ = choose(items, 2 * 10**9)
    assert size(chosen.values()) <= 2 * 10**9 and cost(chosen.values()) == 2.0
