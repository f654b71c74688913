"""Intervals of shares and differences, and the comparison of answers to the gold set."""

import numpy as np
import pytest
import scipy.stats

from quantline.metrics.gold_set import GoldResult
from quantline.metrics.significance import (
    compare_gold,
    compare_tasks,
    normal_quantile,
    paired_bootstrap,
    wilson,
)


def results(answers: list[bool], task: str = "task") -> list[GoldResult]:
    return [
        GoldResult(f"{task}{index}", task, correct, []) for index, correct in enumerate(answers)
    ]


def test_normal_quantile_is_two_sided():
    assert normal_quantile(0.95) == pytest.approx(1.959964)


def test_compare_gold_counts_flips_and_has_the_exact_mcnemar_test():
    figures = compare_gold(
        results([True] * 8 + [False] * 2), results([False] * 5 + [True] * 4 + [False])
    )
    counts = {key: figures[f"gold_{key}"] for key in ("lost", "won", "flips", "items")}
    assert counts == {"lost": 5, "won": 1, "flips": 6, "items": 10}
    assert figures["gold_accuracy_delta"] == pytest.approx(-0.4)
    assert figures["gold_p_value"] == pytest.approx(scipy.stats.binomtest(5, 6).pvalue)
    assert compare_gold(results([True]), results([True]))["gold_p_value"] == 1


def test_compare_gold_refuses_other_items():
    with pytest.raises(ValueError, match="same gold items"):
        compare_gold(results([True, False]), results([True]))


def test_compare_tasks_compares_each_task_on_its_own():
    tasks = compare_tasks(
        results([True, True], "b") + results([True], "a"),
        results([True, False], "b") + results([True], "a"),
    )
    assert list(tasks) == ["a", "b"]
    assert (tasks["b"]["accuracy"], tasks["b"]["lost"], tasks["b"]["items"]) == (0.5, 1, 2)
    assert tasks["a"]["flips"] == 0


@pytest.mark.parametrize(("hits", "count"), [(0, 9), (9, 9), (5, 9), (479, 480)])
def test_wilson_is_scipys(hits, count):
    expected = scipy.stats.binomtest(hits, count).proportion_ci(0.9, method="wilson")
    assert wilson(hits, count, 0.9) == pytest.approx((expected.low, expected.high))


def test_paired_bootstrap_holds_the_difference_as_often_as_it_says():
    lost, won, count = 0.06, 0.02, 300
    draw = np.random.default_rng(1)
    held = 0
    for a, b, _ in draw.multinomial(count, [lost, won, 1 - lost - won], size=300):
        low, high = paired_bootstrap(a, b, count, 0.9)
        held += low <= won - lost <= high
    assert 0.86 <= held / 300 <= 0.94
    assert paired_bootstrap(12, 3, 100) == paired_bootstrap(12, 3, 100)


def test_paired_bootstrap_without_a_flip_does_not_prove_that_there_is_no_difference():
    few = paired_bootstrap(0, 0, 9)
    many = paired_bootstrap(0, 0, 900)
    assert few[0] < -0.05 < many[0] < 0 < many[1] < 0.05 < few[1]
