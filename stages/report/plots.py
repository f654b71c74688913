"""The Pareto plot as inline SVG: size against divergence."""

import io

COLOURS = {"safetensors": "#3b6fb6", "gguf": "#c2571a", "onnx": "#3f8f5b"}
FLOOR = 1e-6  # a divergence below this is rounding; a logarithmic axis has to end somewhere
MIB = 2**20


def pareto_svg(rows: list[dict]) -> str:
    """An SVG element for the variants that were measured; text follows the page's colour."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    settings = {"svg.fonttype": "none", "svg.hashsalt": "quantline", "font.family": "sans-serif", "font.size": 11}
    with matplotlib.rc_context(settings):
        figure, axes = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
        points = []
        for row in sorted(rows, key=lambda row: row["metrics"]["size_bytes"]):
            x, y = row["metrics"]["size_bytes"] / MIB, max(row["metrics"]["mean_kld"], FLOOR)
            points.append((x, y, row["variant"]))
            axes.scatter(x, y, s=70 if row["pareto"] else 36, color=COLOURS[row["format"]], zorder=3,
                         edgecolors="#111111" if row["pareto"] else "none", linewidths=1.2)
        front = [(row["metrics"]["size_bytes"] / MIB, max(row["metrics"]["mean_kld"], FLOOR)) for row in rows
                 if row["pareto"]]
        axes.plot(*zip(*sorted(front), strict=True), color="#999999", linewidth=1, zorder=2)
        placed: list[tuple[float, float]] = []
        axes.set_yscale("log")
        axes.set_ylim(FLOOR / 3, max(y for _, y, _ in points) * 4)
        axes.set_xlim(0, max(x for x, _, _ in points) * 1.2)
        figure.canvas.draw()
        for x, y, name in points:
            px, py = axes.transData.transform((x, y))
            lift = 6
            while any(abs(px - qx) < 95 and abs(py + lift - qy) < 13 for qx, qy in placed):
                lift += 13
            placed.append((px, py + lift))
            axes.annotate(name, (x, y), xytext=(7, lift * 0.72), textcoords="offset points", fontsize=9)
        axes.set_xlabel("size on disk, MiB")
        axes.set_ylabel("mean KL divergence (log)")
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
