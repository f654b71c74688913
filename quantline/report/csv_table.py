"""The report as CSV: a line for each variant, a column for each figure."""

import csv
import io
from typing import Any

from quantline.metrics.figure import is_measured
from quantline.report.build import Report

FIRST = ("variant", "recipe", "format", "runtime", "status", "failure", "pick", "pareto")
# What a spreadsheet would take for a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def render_csv(report: Report) -> str:
    """Return the figures of all variants, unrounded, under their keys in metrics/."""
    keys = sorted(
        {key for row in report.measured for key, value in row.figures.items() if is_measured(value)}
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIRST, *keys])
    for row in report.variants:
        named = [row.variant, row.recipe, row.format, row.runtime, row.status, row.failure or ""]
        marks = [row.variant == report.pick, row.pareto]
        figures = [row.figures.get(key) for key in keys]
        writer.writerow([_safe(value) for value in (*named, *marks, *figures)])
    return text.getvalue()


def _safe(value: Any) -> Any:
    """Return a value that no spreadsheet runs."""
    if isinstance(value, str) and value.startswith(FORMULA):
        return f"'{value}"
    return "" if value is None else value
