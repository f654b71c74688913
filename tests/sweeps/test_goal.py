"""What a search looks for."""

import math

import pytest

from quantline.errors import ConfigError
from quantline.sweeps.goal import Goal, Limit, Objective, read_goal
from quantline.sweeps.space import read_space

GRID = read_space(["recipes.gptq.bits=2,3"])
RANGE = read_space(["recipes.gptq.damping=interval(0.01,1)"])


def test_read_goal_takes_the_divergence_for_granted():
    assert read_goal(40, [], [], [], GRID) == Goal(40, (Objective("mean_kld", True),), ())
    assert read_goal(None, [], [], [], GRID) is None


def test_read_goal_reads_figures_and_limits():
    goal = read_goal(
        9, ["size_bytes"], ["gold_accuracy"], ["mean_kld<=0.1", "same_top_p ≥ .9"], GRID
    )
    assert goal is not None
    assert goal.objectives == (Objective("size_bytes", True), Objective("gold_accuracy", False))
    assert goal.limits == (Limit("mean_kld", "<=", 0.1), Limit("same_top_p", ">=", 0.9))
    assert (
        goal.text
        == "lowers size and raises gold accuracy, subject to mean_kld<=0.1, same_top_p>=0.9"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, ["mean_kld"], [], []), "--optuna"),
        ((9, ["mean_kdl"], [], []), "mean_kld"),
        ((9, [], [], ["size_bytes=3"]), "size_bytes<=2e9"),
        ((9, [], [], ["size_bytes<=1e"]), "size_bytes<=2e9"),
        ((9, [], [], ["size_bytes<=1e999"]), "size_bytes<=2e9"),
        ((9, [], [], ["sice_bytes<=3"]), "sice_bytes"),
    ],
)
def test_read_goal_refuses(arguments, words):
    with pytest.raises(ConfigError, match=words):
        read_goal(*arguments, GRID)


def test_an_interval_needs_a_search():
    with pytest.raises(ConfigError, match=r"recipes\.gptq\.damping.*--optuna"):
        read_goal(None, [], [], [], RANGE)


@pytest.mark.parametrize(
    ("limit", "value", "kept"),
    [
        (Limit("a", "<=", 2.0), 2.0, True),
        (Limit("a", "<", 2.0), 2.0, False),
        (Limit("a", ">=", 2.0), 1.0, False),
        (Limit("a", ">", 2.0), 3.0, True),
        (Limit("a", "<=", 0.0), 0.1, False),
        (Limit("a", "<=", 2.0), math.nan, False),
        (Limit("a", "<=", 2.0), None, False),
    ],
)
def test_violation_is_above_zero_where_a_limit_is_not_kept(limit, value, kept):
    assert (limit.violation({"a": value}) <= 0) == kept


def test_rank_puts_limits_before_figures_and_what_is_not_measured_last():
    goal = Goal(9, (Objective("a", False),), (Limit("b", "<=", 1.0),))
    within = goal.rank({"a": 1, "b": 0.5})
    beyond = goal.rank({"a": 9, "b": 2})
    assert goal.rank({"a": 2, "b": 1}) < within < beyond < goal.rank({"b": 0})
    assert goal.values({"a": math.nan}) is None
