"""What a figure from a sample is worth: intervals, and whether a variant answers the gold set differently.

Tokens and questions count as independent draws, as in llama.cpp's `perplexity` tool.
"""

import math

import numpy as np
from scipy.special import ndtri

from quantline.metrics.gold_set import GoldResult

LEVEL = 0.95
DRAWS, SEED = 20_000, 0  # of the bootstrap


def normal_quantile(level: float) -> float:
    """How many standard errors a two-sided interval of this level reaches to each side: 1.96 for 95 %."""
    return float(ndtri((1 + level) / 2))


def wilson(hits: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Interval of a share, `hits` of `n` (Wilson, JASA 22, 1927): sound near 0 and 1, where 0 of n is not 0 ± 0."""
    z, share = normal_quantile(level), hits / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(lost: int, won: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Interval of (won - lost) / n: percentiles over `DRAWS` resamples of the n items, the same on every call.

    Only how many items are lost, won and the same matters, so a resample is one multinomial draw. One half is added to
    each cell of the table of both answers (Agresti and Min, Statistics in Medicine 24, 2005): without a flip,
    resampling what is there would say that there is no difference, to any precision.
    """
    shares = np.array([lost + 0.5, won + 0.5, n - lost - won + 1]) / (n + 2)
    counts = np.random.default_rng(SEED).multinomial(n, shares, size=DRAWS)
    low, high = np.quantile((counts[:, 1] - counts[:, 0]) / n, [(1 - level) / 2, (1 + level) / 2])
    return min(float(low), (won - lost) / n), max(float(high), (won - lost) / n)


def compare_gold(baseline: list[GoldResult], variant: list[GoldResult]) -> dict[str, float | int | list[float]]:
    """Accuracy, its difference to the baseline, flips in both directions, and the exact McNemar p-value.

    McNemar (1947): under no difference, each item that flips is as likely to be lost as won, so the number lost is
    binomial with one half. The intervals are of level `LEVEL`. Both lists hold the same items in the same order.
    """
    from scipy.stats import binomtest

    if [one.id for one in baseline] != [one.id for one in variant]:
        raise ValueError("expected the same gold items in the same order")
    items = len(variant)
    lost = sum(a.correct and not b.correct for a, b in zip(baseline, variant, strict=True))
    won = sum(b.correct and not a.correct for a, b in zip(baseline, variant, strict=True))
    right = sum(one.correct for one in variant)
    share, delta = right / items, (won - lost) / items
    return {
        "gold_accuracy": share, "gold_accuracy_se": math.sqrt(share * (1 - share) / items),
        "gold_accuracy_interval": list(wilson(right, items)),
        "gold_accuracy_delta": delta, "gold_accuracy_delta_se": math.sqrt(((lost + won) / items - delta**2) / items),
        "gold_accuracy_delta_interval": list(paired_bootstrap(lost, won, items)),
        "gold_flips": lost + won, "gold_lost": lost, "gold_won": won, "gold_items": items,
        "gold_p_value": float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0,
    }


def compare_tasks(baseline: list[GoldResult], variant: list[GoldResult]) -> dict[str, dict]:
    """`compare_gold` of each task, under names without `gold_`."""
    both = list(zip(baseline, variant, strict=True))
    return {task: {key.removeprefix("gold_"): value for key, value in compare_gold(
        *zip(*(pair for pair in both if pair[1].task == task), strict=True)).items()}
        for task in sorted({one.task for one in variant})}
