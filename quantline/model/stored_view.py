"""Where a tensor of the model lies in the checkpoint's files: as it is, or as strips of others.

transformers builds some parameters of several stored tensors, and quantline takes some of them
apart: the weight of one expert is a part of a fused tensor, perhaps transposed or interleaved.
Each of them is a list of strips, which are strided views of stored tensors. That is exact, can be
read without torch, and can be turned around.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

# Called with a key and a range of its first dimension; returns those rows as they are stored.
ReadRows = Callable[[str, int, int], np.ndarray]


class Strip(NamedTuple):
    """Rows of a tensor, as a stored tensor holds them.

    Attributes:
        key: The stored tensor.
        first: The position of the first value in the flat stored tensor.
        rows: How many rows.
        step: Positions from one row to the next.
    """

    key: str
    first: int
    rows: int
    step: int


@dataclass(frozen=True)
class StoredView:
    """A tensor of the model as a view of stored tensors.

    Attributes:
        shape: Of the tensor.
        strips: Its rows, in their order: what its last dimension spans, or single values of a
            vector.
        step: Positions from one column to the next.
    """

    shape: tuple[int, ...]
    strips: tuple[Strip, ...]
    step: int = 1

    @property
    def keys(self) -> tuple[str, ...]:
        """The stored tensors that it is made of, without repetition."""
        return tuple(dict.fromkeys(strip.key for strip in self.strips))

    @property
    def columns(self) -> int:
        """How many values a row has."""
        return prod(self.shape) // sum(strip.rows for strip in self.strips)

    def is_whole(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Whether it has all values of one stored tensor, in any order.

        Args:
            shapes: Stored tensor → its shape.
        """
        return len(self.keys) == 1 and prod(self.shape) == prod(shapes[self.keys[0]])

    def is_plain(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Whether it is a stored tensor as it is (`shapes` as in `is_whole`)."""
        whole = self.is_whole(shapes) and self.shape == shapes[self.keys[0]]
        rows = self.strips[0].step == self.columns or self.strips[0].rows == 1
        return whole and len(self.strips) == 1 and self.step == 1 and rows

    def read(self, read_rows: ReadRows, shapes: dict[str, tuple[int, ...]]) -> np.ndarray:
        """Return the tensor in the type that it is stored in; in float32 where these are several.

        Only those rows of a stored tensor's first dimension are read that it has values in.
        """
        parts = []
        for strip in self.strips:
            shape = shapes[strip.key]
            width = prod(shape[1:])
            lowest, highest = self._span(strip)
            start = lowest // width if shape else 0
            end = highest // width + 1 if shape else 1
            stored = read_rows(strip.key, start, end).reshape(-1)
            part = self._strided(stored, strip, strip.first - start * width)
            parts.append(part)
        if len({part.dtype for part in parts}) > 1:  # numpy knows none above float16 and bfloat16
            parts = [part.astype(np.float32) for part in parts]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return np.ascontiguousarray(joined).reshape(self.shape)

    def write_part(self, values: np.ndarray, key: str, stored: np.ndarray) -> None:
        """Put values into one of the stored tensors, where `read` would read them."""
        rows = values.reshape(-1, self.columns)
        start = 0
        for strip in self.strips:
            if strip.key == key:
                flat = stored.reshape(-1)  # a view: stored tensors are contiguous
                self._strided(flat, strip, strip.first)[:] = rows[start : start + strip.rows]
            start += strip.rows

    def _span(self, strip: Strip) -> tuple[int, int]:
        """Return the lowest and the highest position that a strip has."""
        by_row = (strip.rows - 1) * strip.step
        by_column = (self.columns - 1) * self.step
        lowest = strip.first + min(by_row, 0) + min(by_column, 0)
        return lowest, strip.first + max(by_row, 0) + max(by_column, 0)

    def _strided(self, flat: np.ndarray, strip: Strip, first: int) -> np.ndarray:
        """Return the strip as a view [rows, columns] of a flat array that it begins at `first`."""
        lowest, highest = (position - strip.first + first for position in self._span(strip))
        assert lowest >= 0 and highest < len(flat)
        size = flat.itemsize
        return np.lib.stride_tricks.as_strided(
            flat[first:],
            (strip.rows, self.columns),
            (strip.step * size, self.step * size),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` restores it from."""
        strips = [list(strip) for strip in self.strips]
        return {"shape": list(self.shape), "strips": strips, "step": self.step}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "StoredView":
        """Restore it from what `to_json` returned."""
        strips = tuple(Strip(*strip) for strip in entry["strips"])
        return cls(tuple(entry["shape"]), strips, entry["step"])


def plain_view(key: str, shape: tuple[int, ...]) -> StoredView:
    """Return the view that is a stored tensor as it is."""
    columns = shape[-1] if shape else 1
    return StoredView(shape, (Strip(key, 0, prod(shape) // max(columns, 1), columns),))


def view_of_positions(positions: np.ndarray, starts: dict[str, int]) -> StoredView | None:
    """Return the view of a tensor, given where each of its values comes from.

    Args:
        positions: int of the tensor's shape: the position of each value, where all stored tensors
            lie flat one after the other.
        starts: Stored tensor → where it begins in that, ascending.

    Returns:
        None if the columns of all rows do not have the same step.
    """
    width = positions.shape[-1] if positions.ndim else 1
    view = _view_of_rows(positions.reshape(-1, width), positions.shape, starts)
    if view is None and positions.ndim == 1:
        return _view_of_rows(positions.reshape(-1, 1), positions.shape, starts)
    return view


def _view_of_rows(
    rows: np.ndarray, shape: tuple[int, ...], starts: dict[str, int]
) -> StoredView | None:
    """Return the view of a tensor, given the positions [rows, columns] of its values."""
    step = int(rows[0, 1] - rows[0, 0]) if rows.shape[1] > 1 else 1
    first = rows[:, 0]
    expected = first[:, None] + step * np.arange(rows.shape[1], dtype=rows.dtype)
    if not np.array_equal(rows, expected):
        return None
    keys = list(starts)
    begins = np.array(list(starts.values()))
    owner = np.searchsorted(begins, first, side="right") - 1
    last_owner = np.searchsorted(begins, rows[:, -1], side="right") - 1
    if not np.array_equal(owner, last_owner):
        return None
    strips = []
    for start, end, row_step in _runs(first, owner):
        key = keys[owner[start]]
        strips.append(Strip(key, int(first[start] - starts[key]), end - start, row_step))
    return StoredView(tuple(shape), tuple(strips), step)


def _runs(first: np.ndarray, owner: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, step) of rows that follow each other by one step in one tensor."""
    start = 0
    while start < len(first):
        end = start + 1
        step = 0
        if end < len(first) and owner[end] == owner[start]:
            step = int(first[end] - first[start])
            breaks = np.flatnonzero(
                (np.diff(first[start:]) != step) | (np.diff(owner[start:]) != 0)
            )
            end = start + int(breaks[0]) + 1 if len(breaks) else len(first)
        yield start, end, step
        start = end
