"""What a budget chose, and how the result compares with the uniform recipe of its size."""

from collections import Counter
from typing import Any

from quantline.files import MIB
from quantline.report.variant import VariantRow

# Options of a recipe in which a fitted variant and its uniform counterpart may differ.
CHOSEN_OPTIONS = ("name", "budget", "mix", "overrides", "bits", "group_size")


def budget_summary(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the report says of a choice; None for a variant without a budget.

    Returns:
        {predicted, price_per_mib, unit, rounding, counts}: the predicted cost, what one MiB more
        would bring, and how many tensors have each type.
    """
    for step in manifest.get("transforms", ()):
        if step["step"] == "budget":
            summary = {key: step[key] for key in ("predicted", "price_per_mib", "unit", "rounding")}
            counts = Counter(choice["what"] for choice in step["chosen"].values())
            return summary | {"counts": dict(sorted(counts.items()))}
    return None


def uniform_counterpart(row: VariantRow, rows: "list[VariantRow]") -> dict[str, Any] | None:
    """Return the uniform variant that a fitted one is compared with.

    It is the nearest in size of those that are made and served alike.

    Returns:
        {variant, size_bytes, mean_kld, mean_kld_se, kld_change}, the last being the share by which
        the fitted variant's mean KL divergence is larger (negative: smaller). None for a variant
        without a budget, and where there is no counterpart.
    """
    if not row.budget:
        return None
    alike = [
        candidate
        for candidate in rows
        if candidate.is_measured and not candidate.budget and _kind(candidate) == _kind(row)
    ]
    if not alike:
        return None
    size = row.metrics["size_bytes"]
    nearest = min(alike, key=lambda other: (abs(other.metrics["size_bytes"] - size), other.variant))
    kld = nearest.metrics["mean_kld"]
    return {
        "variant": nearest.variant,
        "size_bytes": nearest.metrics["size_bytes"],
        "mean_kld": kld,
        "mean_kld_se": nearest.metrics["mean_kld_se"],
        "kld_change": row.metrics["mean_kld"] / kld - 1 if kld > 0 else None,
    }


def describe_counterpart(row: VariantRow) -> str:
    """Return the comparison of a fitted variant with its uniform counterpart in words."""
    assert row.beside is not None, f"{row.variant} has no counterpart"
    size = row.beside["size_bytes"] / MIB
    text = f"{row.variant} beside {row.beside['variant']} of {size:.2f} MiB"
    change = row.beside["kld_change"]
    return text if change is None else f"{text}: KL divergence {100 * change:+.0f} %"


def _kind(row: VariantRow) -> tuple[str, str, list[tuple[str, str]]]:
    """Return how a variant is made and served, but for what a budget chooses."""
    options = [
        (key, str(value))
        for key, value in row.lineage["recipe"].items()
        if key not in CHOSEN_OPTIONS
    ]
    return row.format, row.runtime, sorted(options)
