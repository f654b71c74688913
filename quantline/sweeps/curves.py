"""Divergence against bits per weight, a line for each method, as inline SVG."""

import io
from collections.abc import Sequence
from typing import Any

from quantline.report.pareto import pareto_front
from quantline.report.plots import BLACK, DPI, FLOOR, GREY, SETTINGS, for_page
from quantline.sweeps.results import Result

# Okabe and Ito's colours, which stay apart for eyes that see fewer, without yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6a51a3")
MARKERS = "osD^vPX"
ALONG = ("bits", "mix", "budget")  # options along which a curve runs, the first that varies
TITLE = "Divergence from full precision against bits per weight"


def curve_axis(keys: Sequence[str]) -> str | None:
    """Return the axis along which curves run: the one that changes the bits; else the first."""
    for option in ALONG:
        for key in keys:
            if option in key.split("."):
                return key
    return keys[0] if keys else None


def curves_of(results: Sequence[Result], along: str | None) -> dict[str, list[Result]]:
    """Return the points of each curve, by its name and in the order of their bits per weight.

    Experiments that differ in `along` alone are one curve. What the workspace has are points.

    Args:
        results: Measured ones.
        along: Key of the axis along which curves run.
    """
    formats: dict[str, set[str]] = {}
    for result in results:
        formats.setdefault(result.method, set()).add(result.row.format)
    curves: dict[str, list[Result]] = {}
    for result in results:
        if not result.experiment:
            continue
        several = len(formats[result.method]) > 1
        words = [f"{result.method} ({result.row.format})" if several else result.method]
        for key, value in result.choice.items():
            if key != along:
                words.append(f"{key.rpartition('.')[2]} {value}")
        curves.setdefault(", ".join(words), []).append(result)
    for points in curves.values():
        points.sort(key=lambda result: (result.row.metrics["bits_per_weight"], result.row.variant))
    return dict(sorted(curves.items()))


def curves_svg(results: Sequence[Result], keys: Sequence[str], pick: str | None) -> str:
    """Draw the curves.

    Args:
        results: Measured ones.
        keys: Of the axes.
        pick: The name of the one to ship, around which a ring is drawn.

    Returns:
        An SVG element, whose text follows the page's colour.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    curves = curves_of(results, curve_axis(keys))
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": "quantline curves"}):
        figure, axes = pyplot.subplots(figsize=(6.6, 5.0), dpi=DPI, layout="constrained")
        _draw_curves(axes, curves)
        others = [result for result in results if not result.experiment]
        if others:
            x, y, _ = _places(others)
            label = "the project's others"
            axes.scatter(x, y, s=26, facecolors="none", edgecolors=GREY, zorder=2, label=label)
        _draw_front(axes, results)
        for result in results:
            if result.row.variant == pick:
                x, y, _ = _places([result])
                axes.scatter(
                    x,
                    y,
                    s=190,
                    zorder=5,
                    facecolors="none",
                    edgecolors=BLACK,
                    linewidths=1.6,
                    label="the pick",
                )
        axes.set_yscale("log")
        # Plain digits, which follow the page's colour; within a decade those at 2 and 5 too.
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("bits per weight, of the whole model")
        axes.set_ylabel("mean KL divergence from full precision (log)")
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(frameon=False, loc="outside lower left", ncols=2, fontsize=10)
        text = io.StringIO()
        metadata = {"Date": None, "Creator": None}
        figure.savefig(text, format="svg", transparent=True, metadata=metadata)
        pyplot.close(figure)
    return for_page(text.getvalue(), "curves", f"{TITLE}. {_described(curves)}")


def _draw_curves(axes: Any, curves: dict[str, list[Result]]) -> None:
    """Draw each curve with the standard errors of its points; a method has one colour."""
    methods = sorted({points[0].method for points in curves.values()})
    drawn: dict[str, int] = {}
    for name, points in curves.items():
        method = points[0].method
        colour = COLOURS[methods.index(method) % len(COLOURS)]
        marker = MARKERS[drawn.get(method, 0) % len(MARKERS)]
        style = ("-", "--", ":", "-.")[drawn.get(method, 0) % 4]
        drawn[method] = drawn.get(method, 0) + 1
        x, y, errors = _places(points)
        # An error as large as its value has no end on a logarithmic axis.
        low = [min(error, 0.9 * value) for error, value in zip(errors, y, strict=True)]
        axes.errorbar(
            x,
            y,
            yerr=[low, errors],
            color=colour,
            marker=marker,
            linestyle=style,
            linewidth=1.4,
            markersize=6,
            elinewidth=0.8,
            capsize=2,
            zorder=3,
            label=name,
        )


def _draw_front(axes: Any, results: Sequence[Result]) -> None:
    x, y, _ = _places(results)
    front = pareto_front(list(zip(x, y, strict=True)))
    axes.plot(
        *zip(*front, strict=True),
        color=GREY,
        linewidth=4,
        alpha=0.3,
        zorder=1,
        drawstyle="steps-post",
        label="the Pareto front",
    )


def _places(results: Sequence[Result]) -> tuple[list[float], list[float], list[float]]:
    """Return bits per weight, divergence and its standard error of each result."""
    x = [float(result.row.metrics["bits_per_weight"]) for result in results]
    y = [max(float(result.row.metrics["mean_kld"]), FLOOR) for result in results]
    errors = [float(result.row.metrics["mean_kld_se"]) for result in results]
    return x, y, errors


def _described(curves: dict[str, list[Result]]) -> str:
    """Return all points in words."""
    sentences = []
    for name, points in curves.items():
        x, y, _ = _places(points)
        parts = [f"{bits:.2f} bits {kld:.3g}" for bits, kld in zip(x, y, strict=True)]
        sentences.append(f"{name}: {', '.join(parts)}")
    return "; ".join(sentences)
