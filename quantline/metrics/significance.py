"""What a figure from a sample is worth: intervals, and the comparison of two sets of answers.

Tokens and questions count as independent draws, as in llama.cpp's `perplexity` tool.
"""

import math
from typing import Any

import numpy as np

from quantline.metrics.gold_set import GoldResult

LEVEL = 0.95
DRAWS = 20_000  # of the bootstrap
SEED = 0


def normal_quantile(level: float) -> float:
    """Return how many standard errors a two-sided interval of this level reaches to each side.

    It is 1.96 for a level of 0.95.
    """
    from scipy.special import ndtri

    return float(ndtri((1 + level) / 2))


def wilson(hits: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval of a share, `hits` of `count` (Wilson, JASA 22, 1927).

    It is sound near 0 and 1, where 0 of n is not 0 ± 0.
    """
    z = normal_quantile(level)
    share = hits / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    root = math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    half = z / (1 + z**2 / count) * root
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(lost: int, won: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval of (won - lost) / count, the same on every call.

    Percentiles over `DRAWS` resamples of the items. Only how many items are lost, won and the same
    matters, so a resample is one multinomial draw. One half is added to each cell of the table of
    both answers (Agresti and Min, Statistics in Medicine 24, 2005): without a flip, resampling what
    is there would say that there is no difference, to any precision.

    Args:
        lost: Items that the baseline answers and the variant does not.
        won: Items that the variant answers and the baseline does not.
        count: All items.
        level: Of the interval.
    """
    shares = np.array([lost + 0.5, won + 0.5, count - lost - won + 1]) / (count + 2)
    draws = np.random.default_rng(SEED).multinomial(count, shares, size=DRAWS)
    differences = (draws[:, 1] - draws[:, 0]) / count
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    observed = (won - lost) / count
    return min(float(low), observed), max(float(high), observed)


def compare_gold(baseline: list[GoldResult], variant: list[GoldResult]) -> dict[str, Any]:
    """Compare a variant's answers to the unquantized model's.

    McNemar (1947): under no difference, each item that flips is as likely to be lost as won, so the
    number lost is binomial with one half. The intervals are of level `LEVEL`.

    Args:
        baseline: The unquantized model's results.
        variant: Of the same items in the same order.

    Returns:
        Accuracy, its difference to the baseline, flips in both directions, and the exact p-value of
        McNemar's test, under keys that begin with "gold_".

    Raises:
        ValueError: If the items are not the same.
    """
    from scipy.stats import binomtest

    if [result.id for result in baseline] != [result.id for result in variant]:
        raise ValueError("expected the same gold items in the same order")
    items = len(variant)
    lost = 0
    won = 0
    for before, after in zip(baseline, variant, strict=True):
        lost += before.correct and not after.correct
        won += after.correct and not before.correct
    correct = sum(result.correct for result in variant)
    share = correct / items
    delta = (won - lost) / items
    return {
        "gold_accuracy": share,
        "gold_accuracy_se": math.sqrt(share * (1 - share) / items),
        "gold_accuracy_interval": list(wilson(correct, items)),
        "gold_accuracy_delta": delta,
        "gold_accuracy_delta_se": math.sqrt(((lost + won) / items - delta**2) / items),
        "gold_accuracy_delta_interval": list(paired_bootstrap(lost, won, items)),
        "gold_flips": lost + won,
        "gold_lost": lost,
        "gold_won": won,
        "gold_items": items,
        "gold_p_value": float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0,
    }


def compare_tasks(
    baseline: list[GoldResult], variant: list[GoldResult]
) -> dict[str, dict[str, Any]]:
    """Return `compare_gold` of each task, under keys without "gold_"."""
    compared = {}
    for task in sorted({result.task for result in variant}):
        # Both lists have the items in one order, and the variant's say which task each is of.
        pairs = [
            (before, after)
            for before, after in zip(baseline, variant, strict=True)
            if after.task == task
        ]
        figures = compare_gold([before for before, _ in pairs], [after for _, after in pairs])
        compared[task] = {key.removeprefix("gold_"): value for key, value in figures.items()}
    return compared
