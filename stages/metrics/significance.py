"""Whether a variant answers the gold set differently from the full-precision model."""

from stages.metrics.gold import GoldResult


def compare_gold(baseline: list[GoldResult], variant: list[GoldResult]) -> dict[str, float | int]:
    """Accuracy, its difference to the baseline, flips in both directions, and the exact McNemar p-value.

    McNemar (1947): under no difference, each item that flips is as likely to be lost as won, so the number lost is
    binomial with one half. Both lists hold the same items in the same order.
    """
    from scipy.stats import binomtest

    if [one.id for one in baseline] != [one.id for one in variant]:
        raise ValueError("expected the same gold items in the same order")
    items = len(variant)
    lost = sum(a.correct and not b.correct for a, b in zip(baseline, variant, strict=True))
    won = sum(b.correct and not a.correct for a, b in zip(baseline, variant, strict=True))
    right = sum(one.correct for one in variant)
    return {
        "gold_accuracy": right / items, "gold_accuracy_delta": (won - lost) / items, "gold_flips": lost + won,
        "gold_lost": lost, "gold_won": won, "gold_items": items,
        "gold_p_value": float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0,
    }
