"""The Pareto plots as inline SVG: size against divergence, and size against gold accuracy."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from markupsafe import escape

COLOURS = {"safetensors": "#3b6fb6", "gguf": "#c2571a", "onnx": "#3f8f5b"}
MARKERS = {"safetensors": "o", "gguf": "s", "onnx": "^"}
FLOOR = 1e-6  # a divergence below this is rounding; a logarithmic axis has to end somewhere
MIB = 2**20
DPI = 72  # of SVG, so that pixels are what they were when the labels were placed
LETTER, LINE, GAP = 5.8, 12.0, 8.0  # pixels of a label: width of a letter, height, distance


@dataclass(frozen=True)
class Axis:
    """The vertical axis of a plot; `sign` is -1 where more is better."""

    metric: str
    title: str
    label: str
    scale: str
    sign: int
    of: Callable[[dict], float]
    limits: Callable[[list[float]], tuple[float, float]]
    most: float = np.inf  # the greatest tick


def spread(values: list[float]) -> float:
    return max(max(values) - min(values), 1.0)


DIVERGENCE = Axis(
    "mean_kld", "Size against mean KL divergence from full precision", "mean KL divergence (log)", "log", 1,
    lambda row: max(row["metrics"]["mean_kld"], FLOOR), lambda values: (min(values) / 3, max(values) * 8))
GOLD = Axis(
    "gold_accuracy", "Size against gold accuracy in per cent", "gold accuracy, %", "linear", -1,
    lambda row: 100 * row["metrics"]["gold_accuracy"],
    # Labels of equals are stacked upwards, so there is room above.
    lambda values: (min(values) - 0.15 * spread(values), max(values) + 0.8 * spread(values)), 100)


def label_places(points: np.ndarray, labels: list[str]) -> list[tuple[float, float]]:
    """Where labels begin, in pixels, right of their points [n, 2] and none over another or over a point.

    Of points side by side the labels stand one above the other in the order of the points, joined by lines.
    """
    placed: dict[int, tuple[float, float]] = {}
    for index in sorted(range(len(points)), key=lambda one: tuple(points[one][::-1])):
        x, y = points[index][0] + GAP, points[index][1]

        def taken(x: float, y: float, width: float = LETTER * len(labels[index])) -> bool:
            return any(abs(y - qy) < LINE and x < qx + LETTER * len(labels[other]) and qx < x + width
                       for other, (qx, qy) in placed.items()) or \
                any(abs(y - qy) < 0.8 * LINE and x - 4 < qx < x + width for qx, qy in points)

        while taken(x, y):
            y += 2
            x = points[index][0] + 2 * GAP
        placed[index] = (x, y)
    return [placed[index] for index in range(len(points))]


def right_end(xs: list[float], labels: list[str], width: float) -> float:
    """Where an axis from 0 of `width` pixels ends, so that the label beside each x is on it (if it is not too long)."""
    shares = [min((3 * GAP + LETTER * len(label)) / width, 0.7) for label in labels]
    return max(x / (1 - share) for x, share in zip(xs, shares, strict=True))


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (x, y) that no other beats with less of x and of y, in the order of x."""
    return sorted({(x, y) for x, y in points if not any(p <= x and q <= y and (p, q) != (x, y) for p, q in points)})


def points_of(rows: list[dict], axis: Axis) -> list[tuple[float, float]]:
    """(size in MiB, figure) of each measured variant."""
    return [(row["metrics"]["size_bytes"] / MIB, axis.of(row)) for row in rows]


def front_of(points: list[tuple[float, float]], axis: Axis) -> list[tuple[float, float]]:
    """The points on the Pareto front of a plot, in the order of their size."""
    return [(x, axis.sign * y) for x, y in front([(x, axis.sign * y) for x, y in points])]


def data(rows: list[dict]) -> list[dict]:
    """Both plots as rows for `dvc plots`: figures, and whether they are on the front (templates in .dvc/plots)."""
    told = [{"variant": row["variant"], "format": row["format"], "size_mib": row["metrics"]["size_bytes"] / MIB}
            | {axis.metric: row["metrics"].get(axis.metric) for axis in (DIVERGENCE, GOLD)} for row in rows]
    for axis in (DIVERGENCE, GOLD):
        able = [(row, one) for row, one in zip(rows, told, strict=True) if one[axis.metric] is not None]
        points = points_of([row for row, _ in able], axis)
        best = front_of(points, axis)
        for (_, one), point in zip(able, points, strict=True):
            one[f"{axis.metric}_front"] = point in best
    return told


def pareto_svg(rows: list[dict], axis: Axis, pick: str | None = None) -> str:
    """An SVG element of size against a figure, for the variants that were measured, with the name of the pick in bold;
    text follows the page's colour.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    settings = {"svg.fonttype": "none", "svg.hashsalt": f"quantline {axis.metric}", "font.family": "sans-serif",
                "font.size": 11}
    rows = sorted(rows, key=lambda row: (row["metrics"]["size_bytes"], row["variant"]))
    points = points_of(rows, axis)
    best = front_of(points, axis)
    with matplotlib.rc_context(settings):
        figure, axes = plt.subplots(figsize=(5.2, 4.6), dpi=DPI, layout="constrained")
        for row, point in zip(rows, points, strict=True):
            axes.scatter(*point, s=64 if point in best else 36, color=COLOURS[row["format"]], zorder=3, linewidths=1.2,
                         marker=MARKERS[row["format"]], edgecolors="#000000" if point in best else "none")
        axes.plot(*zip(*best, strict=True), color="#888888", linewidth=1, zorder=2)
        axes.set_yscale(axis.scale)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        limits = axis.limits([y for _, y in points])
        axes.set_ylim(*limits)
        axes.set_yticks([tick for tick in axes.get_yticks() if tick <= axis.most])
        axes.set_ylim(*limits)  # ticks beyond the axis would stretch it
        axes.set_xlim(0, max(x for x, _ in points))
        axes.set_xlabel("size on disk, MiB")
        axes.set_ylabel(axis.label)
        for name in sorted({row["format"] for row in rows}):
            axes.scatter([], [], color=COLOURS[name], marker=MARKERS[name], label=name)
        figure.legend(frameon=False, loc="outside upper right", ncols=3, fontsize=10)  # no point of the plot's
        figure.canvas.draw()  # the width of the axes is known now, and so where the labels end
        # Bold letters are wider: the name of the pick takes two more.
        names = [row["variant"] + "  " * (row["variant"] == pick) for row in rows]
        width = axes.get_window_extent().width
        axes.set_xlim(0, right_end([x for x, _ in points], names, width))
        figure.canvas.draw()  # labels are placed where the points now are
        places = label_places(axes.transData.transform(points), names)
        for row, point, place in zip(rows, points, places, strict=True):
            line = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3,
                    "relpos": (0, 0.5)}
            axes.annotate(row["variant"], point, xytext=place, textcoords="figure pixels", fontsize=10, va="center",
                          fontweight="bold" if row["variant"] == pick else "normal", arrowprops=line).set_in_layout(False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    told = "; ".join(f"{row['variant']} {x:.1f} MiB, {y:.4g}" for row, (x, y) in zip(rows, points, strict=True))
    return _for_page(text.getvalue(), axis.metric, f"{axis.title}. {told}")


def _for_page(svg: str, prefix: str, told: str) -> str:
    """The SVG element with a text alternative, ids of its own on the page, and the page's colour for black."""
    svg = svg[svg.index("<svg"):].replace("<svg ", f'<svg role="img" aria-label="{escape(told)}" ', 1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for black in ("#000000", "black"):
        svg = svg.replace(f"fill: {black}", "fill: currentColor").replace(f"stroke: {black}", "stroke: currentColor")
    # Text without a colour of its own is black; let it follow the page, which may be dark.
    return svg.replace("<text ", '<text fill="currentColor" ')
