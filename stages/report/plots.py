"""The Pareto plot as inline SVG: size against divergence."""

import io

import numpy as np

COLOURS = {"safetensors": "#3b6fb6", "gguf": "#c2571a", "onnx": "#3f8f5b"}
FLOOR = 1e-6  # a divergence below this is rounding; a logarithmic axis has to end somewhere
MIB = 2**20
DPI = 72  # of SVG, so that pixels are what they were when the labels were placed
LETTER, LINE, GAP = 5.2, 11.0, 8.0  # pixels of a label: width of a letter, height, distance


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
                any(abs(y - qy) < LINE / 2 and x - 4 < qx < x + width for qx, qy in points)

        while taken(x, y):
            y += 2
            x = points[index][0] + 2 * GAP
        placed[index] = (x, y)
    return [placed[index] for index in range(len(points))]


def pareto_svg(rows: list[dict]) -> str:
    """An SVG element for the variants that were measured; text follows the page's colour."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    settings = {"svg.fonttype": "none", "svg.hashsalt": "quantline", "font.family": "sans-serif", "font.size": 11}
    with matplotlib.rc_context(settings):
        figure, axes = plt.subplots(figsize=(7.6, 4.2), dpi=DPI, layout="constrained")
        points = []
        for row in sorted(rows, key=lambda row: row["metrics"]["size_bytes"]):
            x, y = row["metrics"]["size_bytes"] / MIB, max(row["metrics"]["mean_kld"], FLOOR)
            points.append((x, y, row["variant"]))
            axes.scatter(x, y, s=70 if row["pareto"] else 36, color=COLOURS[row["format"]], zorder=3,
                         edgecolors="#111111" if row["pareto"] else "none", linewidths=1.2)
        front = [(row["metrics"]["size_bytes"] / MIB, max(row["metrics"]["mean_kld"], FLOOR)) for row in rows
                 if row["pareto"]]
        axes.plot(*zip(*sorted(front), strict=True), color="#999999", linewidth=1, zorder=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(FLOOR / 3, max(y for _, y, _ in points) * 4)
        axes.set_xlim(0, max(x for x, _, _ in points) * 1.2)
        axes.set_xlabel("size on disk, MiB")
        axes.set_ylabel("mean KL divergence (log)")
        figure.canvas.draw()  # labels are placed where the points now are
        places = label_places(axes.transData.transform([(x, y) for x, y, _ in points]), [name for *_, name in points])
        for (x, y, name), place in zip(points, places, strict=True):
            axes.annotate(name, (x, y), xytext=place, textcoords="figure pixels", fontsize=9, va="center", arrowprops={
                "arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5),
            }).set_in_layout(False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for name in sorted({row["format"] for row in rows}):
            axes.scatter([], [], color=COLOURS[name], label=name)
        axes.legend(frameon=False, loc="upper right")
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg"):].replace("<svg ", '<svg role="img" aria-label="Size against KL divergence" ', 1)
    for black in ("#000000", "black"):
        svg = svg.replace(f"fill: {black}", "fill: currentColor").replace(f"stroke: {black}", "stroke: currentColor")
    # Text without a colour of its own is black; let it follow the page, which may be dark.
    return svg.replace("<text ", '<text fill="currentColor" ')
