"""The Pareto front."""

from quantline.report.pareto import pareto_front, variants_on_front
from tests.helpers.report import make_row


def test_pareto_front_is_in_the_order_of_x():
    points = [(1, 5), (2, 3), (2, 4), (3, 3), (4, 1)]
    assert pareto_front(points) == [(1, 5), (2, 3), (4, 1)]


def test_variants_on_front_are_those_that_no_other_beats_in_both():
    rows = [
        make_row("small", 1, 0.3),
        make_row("mid", 2, 0.1),
        make_row("beaten", 3, 0.1),
        make_row("big", 4, 0.0),
    ]
    assert variants_on_front(rows) == {"small", "mid", "big"}
    assert variants_on_front([*rows, make_row("equal", 2, 0.1)]) == {"small", "mid", "big", "equal"}
