"""What a variant's point in a plot says where a pointer rests on it, and how it is filtered."""

from collections.abc import Sequence

from markupsafe import escape

from quantline.files import MIB
from quantline.report.variant import VariantRow

POINT = "point-"  # begins the id of a variant's point
LABEL = "label-"  # and that of its name


def with_titles(svg: str, prefix: str, rows: Sequence[VariantRow]) -> str:
    """Return a plot whose points and names have titles.

    Args:
        svg: The plot, with POINT and LABEL before the variants in ids.
        prefix: Of all ids in the plot.
        rows: The variants.
    """
    for row in rows:
        words = escape(" ".join(filter_words(row)))
        title = f"<title>{escape(_said(row))}</title>"
        for kind in (POINT, LABEL):
            before = f'<g id="{prefix}-{kind}{row.variant}">'
            svg = svg.replace(before, f'{before[:-1]} data-variant="{words}">{title}')
    return svg


def filter_words(row: VariantRow) -> tuple[str, ...]:
    """Return the words by which the page's filter finds a variant."""
    return (row.variant, row.recipe, row.format, row.runtime)


def _said(row: VariantRow) -> str:
    """Return the figures of a variant in a few lines."""
    metrics = row.metrics
    lines = [
        f"{row.variant} ({row.format}, {row.runtime})",
        f"{metrics['size_bytes'] / MIB:.1f} MiB, {metrics['bits_per_weight']:.2f} bits per weight",
        f"KL divergence {metrics['mean_kld']:.4g} ± {metrics['mean_kld_se']:.2g}",
    ]
    if "gold_accuracy" in metrics:
        lines.append(f"gold set {metrics['gold_accuracy']:.1%}")
    if "decode_tok_s" in row.speed:
        lines.append(f"{row.speed['decode_tok_s']:.0f} tokens/s")
    return "\n".join(lines)
