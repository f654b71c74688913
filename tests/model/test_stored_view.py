"""A view of stored tensors reads what moving their values makes, and writes it back."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantline.model.stored_view import StoredView, plain_view, view_of_positions

SHAPES = {"a": (4, 6, 8), "b": (10, 8), "c": (4, 6, 8)}
VALUES = {
    key: np.random.default_rng(number).normal(size=shape).astype(np.float32)
    for number, (key, shape) in enumerate(SHAPES.items())
}
MOVES = {
    "as it is": lambda a, b, c: b,
    "one expert": lambda a, b, c: a[2],
    "one expert, turned": lambda a, b, c: a[2].T,
    "one half of it": lambda a, b, c: a[3][:3],
    "every second row": lambda a, b, c: a[1][1::2],
    "every second column, turned": lambda a, b, c: a[1].T[::2],
    "several, one after the other": lambda a, b, c: np.concatenate([a[0], b, c[1]]),
    "stacked": lambda a, b, c: np.stack([a[n] for n in range(4)] + [c[0]]),
    "rows by heads": lambda a, b, c: b.reshape(5, 2, 8).swapaxes(0, 1).reshape(10, 8),
    "one dimension": lambda a, b, c: b.reshape(-1)[3:50],
    "one dimension by heads": lambda a, b, c: b[:, 0].reshape(5, 2).T.reshape(10),
    "one dimension of several": lambda a, b, c: np.concatenate([b[:, 1], a[0, 0, ::3]]),
    "three dimensions": lambda a, b, c: np.concatenate([a, c])[1:7],
}


def view_of(move) -> StoredView | None:
    """Return the view of what a move makes of the positions of all values."""
    starts, positions, start = {}, [], 0
    for key, shape in SHAPES.items():
        size = int(np.prod(shape))
        starts[key] = start
        positions.append(np.arange(start, start + size).reshape(shape))
        start += size
    return view_of_positions(np.ascontiguousarray(move(*positions)), starts)


def read_rows(key: str, start: int, end: int) -> np.ndarray:
    return VALUES[key][start:end]


@pytest.mark.parametrize("name", MOVES)
def test_view_reads_what_the_move_makes(name):
    view = view_of(MOVES[name])
    expected = MOVES[name](*VALUES.values())
    assert np.array_equal(view.read(read_rows, SHAPES), expected)
    restored = StoredView.from_json(view.to_json())
    assert restored == view
    stored = {key: np.zeros(SHAPES[key], np.float32) for key in view.keys}
    for key, values in stored.items():
        view.write_part(expected, key, values)
    again = view.read(lambda key, start, end: stored[key][start:end], SHAPES)
    assert np.array_equal(again, expected)
    untouched = sum(int((values == 0).sum()) for values in stored.values())
    assert untouched == sum(values.size for values in stored.values()) - expected.size


def test_view_of_several_dtypes_is_in_float32():
    """As of a mixture some of whose experts are in another half."""
    large = np.full(SHAPES["a"], 60000, np.float16)
    small = np.full(SHAPES["c"], 1e30, ml_dtypes.bfloat16)
    stored = {"a": large, "b": VALUES["b"].astype(np.float16), "c": small}
    view = view_of(MOVES["several, one after the other"])
    found = view.read(lambda key, start, end: stored[key][start:end], SHAPES)
    assert found.dtype == np.float32
    parts = [stored["a"][0], stored["b"], stored["c"][1]]
    assert np.array_equal(found, np.concatenate([part.astype(np.float32) for part in parts]))


def test_view_of_one_expert_reads_no_other():
    asked = []

    def read(key: str, start: int, end: int) -> np.ndarray:
        asked.append((key, start, end))
        return read_rows(key, start, end)

    view_of(MOVES["one expert, turned"]).read(read, SHAPES)
    assert asked == [("a", 2, 3)]


@given(st.permutations(range(10)), st.booleans())
@settings(max_examples=50, deadline=None)
def test_view_reads_any_order_of_rows(order, turned):
    def move(a, b, c):
        return b[list(order)].T[:, :1] if turned else b[list(order)]

    view = view_of(move)
    assert np.array_equal(view.read(read_rows, SHAPES), move(*VALUES.values()))


def test_there_is_no_view_of_what_has_no_one_step():
    shuffled = np.random.default_rng(0).permutation(8)
    assert view_of(lambda a, b, c: b[:, shuffled]) is None


def test_plain_view_is_the_stored_tensor():
    view = plain_view("a", SHAPES["a"])
    assert view.is_plain(SHAPES)
    assert view.is_whole(SHAPES)
    assert np.array_equal(view.read(read_rows, SHAPES), VALUES["a"])
    assert view_of(lambda a, b, c: b) == plain_view("b", SHAPES["b"])
    turned = view_of(lambda a, b, c: b.T)
    assert turned.is_whole(SHAPES)
    assert not turned.is_plain(SHAPES)
