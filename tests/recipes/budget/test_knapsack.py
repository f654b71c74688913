"""The knapsack: what is chosen fits, and costs no more than the best of all choices."""

from collections.abc import Iterable
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantline.recipes.budget.knapsack import (
    GAP,
    Option,
    choose,
    dominant_options,
    smallest_size,
)

COSTS = st.floats(1e-9, 1.0)
OPTIONS = st.lists(st.tuples(st.integers(0, 40), COSTS), min_size=1, max_size=4)
ITEMS = st.lists(OPTIONS, min_size=1, max_size=5)

Drawn = list[tuple[int, float]]


def options_of(drawn: Drawn, unit: int = 1) -> list[Option]:
    return [Option(f"{index}", size * unit, cost) for index, (size, cost) in enumerate(drawn)]


def items_of(drawn: list[Drawn], unit: int = 1) -> dict[str, list[Option]]:
    return {f"item-{number}": options_of(pairs, unit) for number, pairs in enumerate(drawn)}


def cost_of(options: Iterable[Option]) -> float:
    return sum(option.cost for option in options)


def size_of(options: Iterable[Option]) -> int:
    return sum(option.size for option in options)


@given(ITEMS, st.floats(0, 1), st.sampled_from([1, 144, 2**20 + 1]))
def test_choose_costs_no_more_than_any_other_choice_that_fits(drawn, share, unit):
    items = items_of(drawn, unit)
    least = smallest_size(items)
    most = sum(max(option.size for option in options) for options in items.values())
    limit = least + int(share * (most - least))
    chosen, price = choose(items, limit)
    fitting = [choice for choice in product(*items.values()) if size_of(choice) <= limit]
    best = min(cost_of(choice) for choice in fitting)
    assert list(chosen) == sorted(items)
    for name, option in chosen.items():
        assert option in items[name]
    assert size_of(chosen.values()) <= limit
    assert price >= 0
    assert cost_of(chosen.values()) <= best * (1 + GAP) + 1e-12


@given(ITEMS, st.floats(0, 1))
def test_choose_does_not_depend_on_the_order_of_items_and_options(drawn, share):
    items = items_of(drawn)
    limit = smallest_size(items) + int(40 * share)
    backwards = {name: options[::-1] for name, options in reversed(items.items())}
    assert choose(backwards, limit) == choose(items, limit) == choose(items, limit)


@given(OPTIONS)
def test_dominant_options_are_those_that_no_other_beats(drawn):
    options = options_of(drawn)
    dominant = dominant_options(options)
    assert dominant
    for smaller, larger in pairwise(dominant):
        assert smaller.size < larger.size
        assert smaller.cost > larger.cost
    for option in options:
        beaten = [
            other for other in dominant if other.size <= option.size and other.cost <= option.cost
        ]
        assert beaten


@pytest.mark.parametrize(("limit", "price"), [(5, 0.1), (9, 0.1), (10, 0.0), (20, 0.0)])
def test_choose_returns_the_price_of_another_byte(limit, price):
    items = {"one": [Option("small", 0, 1.0), Option("large", 10, 0.0)]}
    chosen, found = choose(items, limit)
    assert found == pytest.approx(price, abs=1e-9)
    assert chosen["one"].name == ("large" if limit >= 10 else "small")


def test_choose_for_many_tensors_takes_seconds():
    generator = np.random.default_rng(0)
    items = {}
    for number in range(400):
        worth = np.exp(generator.normal(size=1)[0] * 3)
        weights = int(generator.integers(1, 64)) * 2**16
        items[f"{number:03d}"] = [
            Option(f"{bits}", weights * bits // 8, worth * weights * 4.0**-bits)
            for bits in (2, 3, 4, 5, 6, 8)
        ]
    limit = sum(options[2].size for options in items.values())
    chosen, price = choose(items, limit)
    assert limit * 0.999 < size_of(chosen.values()) <= limit
    assert price > 0
    uniform = sum(options[2].cost for options in items.values())
    assert cost_of(chosen.values()) < 0.3 * uniform


def test_choose_refuses_a_limit_below_the_smallest_options():
    items = items_of([[(3, 1.0), (5, 0.5)], [(4, 1.0)]])
    chosen, _ = choose(items, 7)
    assert size_of(chosen.values()) == 7
    with pytest.raises(ValueError, match="a limit of at least 7 bytes, found 6"):
        choose(items, 6)


def test_choose_has_nothing_to_choose_without_items():
    assert choose({}, 0) == ({}, 0.0)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_choose_refuses_costs_that_are_not_finite(wrong):
    with pytest.raises(ValueError, match="finite costs"):
        choose({"one": [Option("a", 1, wrong)]}, 1)


def test_choose_takes_no_excess_that_the_solver_tolerates():
    """One part in a billion is within HiGHS' tolerance, but not within the limit."""
    items = {}
    for number in range(3):
        items[f"{number}"] = [Option("small", 1, 1.0), Option("large", 10**9 + 1, 0.0)]
    chosen, _ = choose(items, 2 * 10**9)
    assert size_of(chosen.values()) <= 2 * 10**9
    assert cost_of(chosen.values()) == 2.0
