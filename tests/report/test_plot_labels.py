"""Labels of a plot."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quantline.report.plot_labels import place_labels, right_end

NAME = "gguf-q4_k_m"


@given(st.lists(st.tuples(st.floats(0, 400), st.floats(0, 300)), min_size=1, max_size=12))
def test_place_labels_covers_no_other_label(points):
    places = place_labels(np.array(points), [NAME] * len(points))
    assert len(places) == len(points)
    for (x, y), (label_x, label_y) in zip(points, places, strict=True):
        assert label_x > x and label_y >= y
    for index, (x, y) in enumerate(places):
        for other_x, other_y in places[:index]:
            assert abs(y - other_y) >= 10.9 or abs(x - other_x) >= 57


def test_right_end_leaves_room_for_the_labels():
    assert right_end([10], [""], 240) == 10 / (1 - 0.1)
    assert right_end([10, 1], ["", NAME], 240) == 10 / (1 - 0.1)
    assert right_end([10], [100 * NAME], 240) == 10 / (1 - 0.7)
