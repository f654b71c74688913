"""The Pareto plots as inline SVG: size against divergence, and size against gold accuracy."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from markupsafe import escape

from quantline.config.containers import CONTAINERS
from quantline.files import MIB
from quantline.metrics.figure import FIGURES
from quantline.report.pareto import Point, pareto_front
from quantline.report.plot_labels import place_labels, right_end
from quantline.report.point_titles import LABEL, POINT, with_titles
from quantline.report.variant import VariantRow

FLOOR = 1e-6  # a divergence below this is rounding; a logarithmic axis has to end somewhere
DPI = 72  # of SVG, so that pixels are what they were when the labels were placed
GREY = "#888888"
BLACK = "#000000"
SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}


def _logarithmic_limits(values: list[float]) -> tuple[float, float]:
    return min(values) / 3, max(values) * 8


def _linear_limits(values: list[float]) -> tuple[float, float]:
    """Leave room above: labels of equals are stacked upwards."""
    spread = max(max(values) - min(values), 1.0)
    return min(values) - 0.15 * spread, max(values) + 0.8 * spread


@dataclass(frozen=True)
class Plot:
    """Size against a figure.

    Attributes:
        metric: Key of the figure on the vertical axis.
        title: What follows "Size against" and the figure's label.
        axis: What follows the label at the axis.
        axis_scale: As matplotlib names it.
        limits: Returns the ends of the axis for the values on it.
        scale: What the figure is multiplied by.
        floor: The least value that is drawn.
        greatest_tick: Ticks above it are left out.
    """

    metric: str
    title: str
    axis: str
    axis_scale: Literal["log", "linear"]
    limits: Callable[[list[float]], tuple[float, float]]
    scale: float = 1.0
    floor: float = -np.inf
    greatest_tick: float = np.inf

    @property
    def full_title(self) -> str:
        """The title with the figure's label."""
        return f"Size against {FIGURES[self.metric].label} {self.title}"

    @property
    def axis_label(self) -> str:
        """The label of the vertical axis."""
        return FIGURES[self.metric].label + self.axis

    @property
    def sign(self) -> int:
        """-1 where more is better, so that the front is made of the least."""
        return -1 if FIGURES[self.metric].better == "higher" else 1

    def points(self, rows: Sequence[VariantRow]) -> list[Point]:
        """Return (size in MiB, figure) of each row."""
        points = []
        for row in rows:
            value = self.scale * row.metrics[self.metric]
            points.append((row.metrics["size_bytes"] / MIB, max(value, self.floor)))
        return points

    def front(self, points: list[Point]) -> list[Point]:
        """Return the points on the Pareto front, in the order of their size."""
        best = pareto_front([(x, self.sign * y) for x, y in points])
        return [(x, self.sign * y) for x, y in best]


DIVERGENCE = Plot(
    "mean_kld",
    title="from full precision",
    axis=" (log)",
    axis_scale="log",
    limits=_logarithmic_limits,
    floor=FLOOR,
)
GOLD = Plot(
    "gold_accuracy",
    title="in per cent",
    axis=", %",
    axis_scale="linear",
    limits=_linear_limits,
    scale=100,
    greatest_tick=100,
)
PLOTS = (DIVERGENCE, GOLD)


def plot_data(rows: Sequence[VariantRow]) -> list[dict[str, Any]]:
    """Return the points of both plots, for other programs.

    Returns:
        {variant, format, size_mib} of each measured variant, the figures, and under <figure>_front
        whether it is on the front of that plot.
    """
    data: list[dict[str, Any]] = []
    for row in rows:
        size = row.metrics["size_bytes"] / MIB
        entry = {"variant": row.variant, "format": row.format, "size_mib": size}
        data.append(entry | {plot.metric: row.metrics.get(plot.metric) for plot in PLOTS})
    for plot in PLOTS:
        measured = [index for index, entry in enumerate(data) if entry[plot.metric] is not None]
        points = plot.points([rows[index] for index in measured])
        front = plot.front(points)
        for index, point in zip(measured, points, strict=True):
            data[index][f"{plot.metric}_front"] = point in front
    return data


def pareto_svg(rows: Sequence[VariantRow], plot: Plot, pick: str | None = None) -> str:
    """Draw a plot.

    Args:
        rows: Variants that have its figure.
        plot: Which one.
        pick: The variant whose name is bold.

    Returns:
        An SVG element, whose text follows the page's colour.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    rows = sorted(rows, key=lambda row: (row.metrics["size_bytes"], row.variant))
    points = plot.points(rows)
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": f"quantline {plot.metric}"}):
        figure, axes = pyplot.subplots(figsize=(5.2, 4.6), dpi=DPI, layout="constrained")
        _draw_points(axes, rows, points, plot.front(points))
        _draw_axes(axes, plot, points)
        for name in sorted({row.format for row in rows}):
            container = CONTAINERS[name]
            axes.scatter([], [], color=container.colour, marker=container.marker, label=name)
        # No point of the plot's is below it.
        figure.legend(frameon=False, loc="outside upper right", ncols=3, fontsize=10)
        figure.canvas.draw()  # the width of the axes is known now, and so where the labels end
        # Bold letters are wider: the name of the pick takes two more.
        names = [row.variant + "  " * (row.variant == pick) for row in rows]
        width = axes.get_window_extent().width
        axes.set_xlim(0, right_end([x for x, _ in points], names, width))
        figure.canvas.draw()  # labels are placed where the points now are
        places = place_labels(axes.transData.transform(points), names)
        _draw_labels(axes, rows, points, places, pick)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(
            text, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
        pyplot.close(figure)
    described = [
        f"{row.variant} {x:.1f} MiB, {y:.4g}" for row, (x, y) in zip(rows, points, strict=True)
    ]
    svg = for_page(text.getvalue(), plot.metric, f"{plot.full_title}. {'; '.join(described)}")
    return with_titles(svg, plot.metric, rows)


def picture(rows: Sequence[VariantRow], plot: Plot, pick: str | None = None) -> str:
    """Return a plot as an SVG file of its own, for `dvc plots`; arguments are as of `pareto_svg`.

    Where no row has the figure, the picture says so.
    """
    able = [row for row in rows if plot.metric in row.metrics]
    if able:
        return pareto_svg(able, plot, pick).replace("currentColor", BLACK)
    said = escape(f"{plot.full_title}: nothing was measured")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="420" height="60" viewBox="0 0 420 60">'
        f'<text x="10" y="34" font-family="sans-serif" font-size="13">{said}</text></svg>\n'
    )


def _draw_points(
    axes: Any, rows: Sequence[VariantRow], points: list[Point], front: list[Point]
) -> None:
    """Draw the points, larger and with a border on the front, and a line along the front."""
    for row, point in zip(rows, points, strict=True):
        container = CONTAINERS[row.format]
        on_front = point in front
        axes.scatter(
            *point,
            gid=f"{POINT}{row.variant}",
            s=64 if on_front else 36,
            color=container.colour,
            zorder=3,
            linewidths=1.2,
            marker=container.marker,
            edgecolors=BLACK if on_front else "none",
        )
    axes.plot(*zip(*front, strict=True), color=GREY, linewidth=1, zorder=2)


def _draw_axes(axes: Any, plot: Plot, points: list[Point]) -> None:
    axes.set_yscale(plot.axis_scale)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    limits = plot.limits([y for _, y in points])
    axes.set_ylim(*limits)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= plot.greatest_tick])
    axes.set_ylim(*limits)  # ticks beyond the axis would stretch it
    axes.set_xlim(0, max(x for x, _ in points))
    axes.set_xlabel("size on disk, MiB")
    axes.set_ylabel(plot.axis_label)


def _draw_labels(
    axes: Any,
    rows: Sequence[VariantRow],
    points: list[Point],
    places: list[Point],
    pick: str | None,
) -> None:
    """Write the variants' names beside their points, joined by lines."""
    line = {
        "arrowstyle": "-",
        "color": GREY,
        "linewidth": 0.6,
        "shrinkA": 0,
        "shrinkB": 3,
        "relpos": (0, 0.5),
    }
    for row, point, place in zip(rows, points, places, strict=True):
        label = axes.annotate(
            row.variant,
            point,
            xytext=place,
            textcoords="figure pixels",
            fontsize=10,
            va="center",
            fontweight="bold" if row.variant == pick else "normal",
            arrowprops=line,
        )
        label.set_in_layout(False)
        label.set_gid(f"{LABEL}{row.variant}")


def for_page(svg: str, prefix: str, description: str) -> str:
    """Prepare an SVG element for the page.

    It gets a text alternative, ids of its own, and the page's colour for black.
    """
    label = f'<svg role="img" aria-label="{escape(description)}" '
    svg = svg[svg.index("<svg") :].replace("<svg ", label, 1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for black in (BLACK, "black"):
        svg = svg.replace(f"fill: {black}", "fill: currentColor")
        svg = svg.replace(f"stroke: {black}", "stroke: currentColor")
    # Text without a colour of its own is black; let it follow the page, which may be dark.
    return svg.replace("<text ", '<text fill="currentColor" ')
