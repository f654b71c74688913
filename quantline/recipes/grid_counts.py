"""How many layers have which grid, in words: what `auto` and budgets chose."""

from collections import Counter
from typing import Any

from quantline.config.recipes import GROUP_SIZES


def grid_counts(layers: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Return what the grids of grouped integers are called → how many layers have them.

    Args:
        layers: Layer → its report, as quantized.json and manifest.json have it.

    Returns:
        Such as {"groups of 128": 560, "groups of 64, symmetric": 30}, the most frequent first;
        nothing for layers that have no groups.
    """
    labels = (_label(report) for report in layers.values() if "group_size" in report)
    counts = Counter(labels)
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def describe_grids(counts: dict[str, int]) -> str:
    """Return the counts in words, such as "groups of 128 (560 layers), whole rows (1 layer)"."""
    parts = [f"{label} ({count} layer{'s' * (count != 1)})" for label, count in counts.items()]
    return ", ".join(parts)


def _label(report: dict[str, Any]) -> str:
    size = report["group_size"]
    is_row = size not in GROUP_SIZES and size == report["shape"][1]
    label = "whole rows" if is_row else f"groups of {size}"
    return f"{label}, symmetric" if report["symmetric"] else label
