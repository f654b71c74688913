"""Which plan a recipe has, and what a budget allows its items."""

from types import SimpleNamespace
from typing import Any

import pytest

from quantline.config.recipes import Budget
from quantline.errors import Failure, StageError
from quantline.recipes.budget.plan import count_weights, item_bytes, load_plan, too_small

SHAPES = {"embedding": (30, 10), "norm": (13,), "weight": (69, 10)}
MIB = 2**20


def context(storage: str = "grouped") -> Any:
    """Return a context of a model of 1003 weights."""
    source = SimpleNamespace(names=list(SHAPES), shape=SHAPES.__getitem__)
    recipe = SimpleNamespace(storage=storage, method="mine")
    return SimpleNamespace(source=source, recipe=recipe)


def plan() -> Any:
    """Return a plan of one item, whose option has 500 bytes without a budget."""
    return SimpleNamespace(
        unbudgeted={"weight": "large"},
        size=lambda item, option: 500,
        fixed_bytes=100,
        overhead_bytes=50,
        extra_overhead_bytes=20,
    )


def test_count_weights_counts_all_tensors():
    assert count_weights(context()) == 1003


def test_item_bytes_are_what_the_rest_of_the_file_leaves():
    ctx = context()
    assert item_bytes(ctx, Budget(size_mib=1), plan()) == MIB - 150
    assert item_bytes(ctx, Budget(bits_per_weight=4), plan()) == 501 - 100
    assert item_bytes(ctx, Budget(), plan()) == 500 - 20


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(size_mib=0.25), r"size_mib: 0\.501, .* found 0\.250"),
        (Budget(bits_per_weight=4), r"bits_per_weight: 2095\.327, .* found 4\.000"),
        (Budget(), r"size_mib: 0\.251, .* found 0\.001"),
    ],
)
def test_too_small_says_the_least_in_the_budgets_unit(budget, words):
    error = too_small(context(), budget, plan(), 262_200)
    assert error.failure == Failure.CONFIG_INVALID
    with pytest.raises(StageError, match=f"expected a budget of at least {words}; raise it"):
        raise error


def test_load_plan_refuses_a_kind_of_tensor_without_a_plan():
    with pytest.raises(StageError, match=r"ggml or grouped .* found mine.* float8") as caught:
        load_plan(context("float8"), {"name": "r"})
    assert caught.value.failure == Failure.CONFIG_INVALID
