"""Plots that are drawn once for all tests: matplotlib takes half a second for a page's."""

from collections.abc import Sequence

from quantline.report.plots import Plot, pareto_svg
from quantline.report.variant import VariantRow

_drawn: dict[tuple[object, ...], str] = {}


def drawn_once(rows: Sequence[VariantRow], plot: Plot, pick: str | None = None) -> str:
    """Return what pareto_svg does; two plots that show the same are one."""
    points = [
        (row.variant, row.format, row.metrics["size_bytes"], row.metrics[plot.metric])
        for row in rows
    ]
    key = (plot, pick, *points)
    if key not in _drawn:
        _drawn[key] = pareto_svg(rows, plot, pick)
    return _drawn[key]
