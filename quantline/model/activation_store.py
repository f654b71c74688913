"""The states of all tokens of a text between two blocks, in batches: in memory while they are few, in a file when not.

A file is read and written, not mapped: pages that are mapped count as the process's memory.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

HELD = 1 << 30  # bytes of one set of states that may stay in memory
Shape = tuple[int, int, int]  # sequences, length, width


class Batches:
    """float32 tensors of `shapes` that are read and replaced one by one."""

    def __init__(self, shapes: list[Shape], folder: Path) -> None:
        """States that outgrow `HELD` lie in a file without a name in `folder`, which is gone with the process."""
        self.shapes, self.folder = shapes, folder
        self.ends = np.cumsum([4 * int(np.prod(shape)) for shape in shapes]).tolist()
        self._held: list[torch.Tensor | None] = [None] * len(shapes)
        self._file: BinaryIO | None = None
        if self.bytes > HELD:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 open as long as this lives

    @property
    def bytes(self) -> int:
        return self.ends[-1]

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, number: int) -> torch.Tensor:
        if self._file is None:
            return self._held[number]
        self._file.seek(self.ends[number - 1] if number else 0)
        return read(self._file, self.shapes[number])

    def __setitem__(self, number: int, batch: torch.Tensor) -> None:
        if self._file is None:
            self._held[number] = batch
        else:
            self._file.seek(self.ends[number - 1] if number else 0)
            self._file.write(batch.contiguous().numpy().data)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[number] for number in range(len(self)))

    def fill(self, batches: Iterable[torch.Tensor]) -> None:
        """Replace all of them."""
        for number, batch in zip(range(len(self)), batches, strict=True):
            self[number] = batch

    def like(self) -> "Batches":
        """Others of the same shapes, to be filled."""
        return Batches(self.shapes, self.folder)


def read(file: BinaryIO, shape: Shape) -> torch.Tensor:
    """The tensor that lies in a file from where it stands. Raises EOFError if the file is too short."""
    values = np.empty(shape, np.float32)
    if file.readinto(values.data.cast("B")) != values.nbytes:
        raise EOFError(f"expected {values.nbytes} bytes of states, found fewer")
    return torch.from_numpy(values)


class StoredStates:
    """Sets of states in a file that outlives the process: what a killed run stored is there for the next.

    There are `slots` of them, and set n lies in slot n modulo that.
    """

    def __init__(self, path: Path, slots: int, like: Batches) -> None:
        self.path, self.slots, self.shapes, self.bytes = path, slots, like.shapes, like.bytes
        path.touch()

    def put(self, number: int, batches: Iterable[torch.Tensor]) -> None:
        with self.path.open("r+b") as file:
            file.seek(number % self.slots * self.bytes)
            for batch in batches:
                file.write(batch.contiguous().numpy().data)

    def get(self, number: int) -> Iterator[torch.Tensor]:
        """Batch after batch."""
        with self.path.open("rb") as file:
            file.seek(number % self.slots * self.bytes)
            for shape in self.shapes:
                yield read(file, shape)
