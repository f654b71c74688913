"""The Pareto front: variants that no other beats in size and in a figure at once."""

from quantline.report.variant import VariantRow

Point = tuple[float, float]


def pareto_front(points: list[Point]) -> list[Point]:
    """Return the points (x, y) that no other beats with less of x and of y, in the order of x."""
    return sorted({point for point in points if not _is_beaten(point, points)})


def _is_beaten(point: Point, points: list[Point]) -> bool:
    x, y = point
    return any(
        other_x <= x and other_y <= y and (other_x, other_y) != point for other_x, other_y in points
    )


def variants_on_front(rows: list[VariantRow]) -> set[str]:
    """Return the variants that no other beats in both size and KL divergence."""
    points = {row.variant: (row.metrics["size_bytes"], row.metrics["mean_kld"]) for row in rows}
    best = pareto_front(list(points.values()))
    return {variant for variant, point in points.items() if point in best}
