"""Where the names of variants stand in a plot: beside their points, and never over each other."""

from collections.abc import Sequence

import numpy as np

# Pixels of a label: width of a letter, height of a line, distance from its point.
LETTER = 5.8
LINE = 12.0
GAP = 8.0


def place_labels(points: np.ndarray, labels: Sequence[str]) -> list[tuple[float, float]]:
    """Return where labels begin, right of their points and none over another or over a point.

    Of points side by side the labels stand one above the other in the order of the points.

    Args:
        points: In pixels, [n, 2].
        labels: Their texts.

    Returns:
        (x, y) in pixels.
    """
    placed: dict[int, tuple[float, float]] = {}
    for index in sorted(range(len(points)), key=lambda number: tuple(points[number][::-1])):
        point_x, point_y = points[index]
        x = point_x + GAP
        y = point_y
        width = LETTER * len(labels[index])
        while _covers_label(x, y, width, placed, labels) or _covers_point(x, y, width, points):
            y += 2
            x = point_x + 2 * GAP
        placed[index] = (x, y)
    return [placed[index] for index in range(len(points))]


def _covers_label(
    x: float,
    y: float,
    width: float,
    placed: dict[int, tuple[float, float]],
    labels: Sequence[str],
) -> bool:
    """Whether a label at (x, y) would stand over one that is placed already."""
    for index, (other_x, other_y) in placed.items():
        other_width = LETTER * len(labels[index])
        if abs(y - other_y) < LINE and x < other_x + other_width and other_x < x + width:
            return True
    return False


def _covers_point(x: float, y: float, width: float, points: np.ndarray) -> bool:
    """Whether a label at (x, y) would stand over a point."""
    return any(
        abs(y - point_y) < 0.8 * LINE and x - 4 < point_x < x + width for point_x, point_y in points
    )


def right_end(xs: Sequence[float], labels: Sequence[str], width: float) -> float:
    """Return where an axis from 0 has to end for every label to fit beside its x.

    A label that is too long gets 70 % of the axis.

    Args:
        xs: Of the points, in units of the axis.
        labels: Their texts.
        width: Of the axis in pixels.
    """
    ends = []
    for x, label in zip(xs, labels, strict=True):
        share = min((3 * GAP + LETTER * len(label)) / width, 0.7)
        ends.append(x / (1 - share))
    return max(ends)
