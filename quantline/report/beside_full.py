"""How large and how fast variants are beside full precision."""

from typing import NamedTuple

from quantline.metrics.figure import is_measured
from quantline.report.build import Report
from quantline.report.variant import VariantRow


class FullPrecision(NamedTuple):
    """What variants are compared with.

    Attributes:
        size_bytes: Of the weights as they came; 0 if that is not known.
        row: The unquantized variant that speeds are compared with; None if there is none.
    """

    size_bytes: int
    row: VariantRow | None


class Beside(NamedTuple):
    """A variant beside full precision, in words; "" for what is not known."""

    size: str
    speed: str


def full_precision(report: Report) -> FullPrecision:
    """Return what variants are compared with: that in safetensors, where there are several."""
    plain = [row for row in report.measured if row.lineage["recipe"].get("method") == "none"]
    plain.sort(key=lambda row: (row.format != "safetensors", row.variant))
    return FullPrecision(report.full_bytes, plain[0] if plain else None)


def beside_full(row: VariantRow, full: FullPrecision) -> Beside:
    """Return size and speed of decoding beside full precision.

    The two speeds may be those of two runtimes: what a user has before and after.
    """
    size = ""
    if full.size_bytes:
        size = f"{row.metrics['size_bytes'] / full.size_bytes:.0%} of full"
    speed = ""
    before = full.row.speed.get("decode_tok_s") if full.row else None
    after = row.speed.get("decode_tok_s")
    if is_measured(before) and is_measured(after) and before > 0:
        speed = f"{after / before:.1f}×"
    return Beside(size, speed)
