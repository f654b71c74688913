"""Hidden states of all tokens of a text between two blocks, in memory or in a file.

A file is read and written, not mapped: mapped pages count as the process's memory.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

RESIDENT_BYTES = 1 << 30  # of one set of states that may stay in memory
Shape = tuple[int, ...]  # sequences, length, width for most models


class ActivationBatches:
    """float32 batches of hidden states that are read and replaced one by one."""

    def __init__(self, shapes: list[Shape], folder: Path) -> None:
        """Make empty batches.

        Args:
            shapes: The shape of each batch.
            folder: Where states that outgrow RESIDENT_BYTES lie, in a file without a name, which
                is gone with the process.
        """
        self.shapes = shapes
        self.folder = folder
        self.ends = np.cumsum([4 * int(np.prod(shape)) for shape in shapes]).tolist()
        self._resident: dict[int, torch.Tensor] = {}
        self._file: BinaryIO | None = None
        if self.bytes > RESIDENT_BYTES:
            # The file is open as long as this object lives.
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    @property
    def bytes(self) -> int:
        """Bytes of all batches together."""
        return self.ends[-1]

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._file is None:
            return self._resident[index]
        self._file.seek(self.ends[index - 1] if index else 0)
        return read_tensor(self._file, self.shapes[index])

    def __setitem__(self, index: int, batch: torch.Tensor) -> None:
        if self._file is None:
            self._resident[index] = batch
        else:
            self._file.seek(self.ends[index - 1] if index else 0)
            self._file.write(batch.contiguous().numpy().data)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))

    def fill(self, batches: Iterable[torch.Tensor]) -> None:
        """Replace all batches."""
        for index, batch in zip(range(len(self)), batches, strict=True):
            self[index] = batch

    def like(self) -> "ActivationBatches":
        """Return empty batches of the same shapes."""
        return ActivationBatches(self.shapes, self.folder)


def read_tensor(file: BinaryIO, shape: Shape) -> torch.Tensor:
    """Read a float32 tensor from a file's position. Raises EOFError if the file is too short."""
    values = np.empty(shape, np.float32)
    if file.readinto(values.data.cast("B")) != values.nbytes:  # type: ignore[attr-defined]
        raise EOFError(f"expected {values.nbytes} bytes of states, found fewer")
    return torch.from_numpy(values)


class ActivationStore:
    """Sets of hidden states in a file that outlives the process.

    What a killed run stored is there for the next. There are `slots` of them, and set n lies in
    slot n modulo that.
    """

    def __init__(self, path: Path, slots: int, like: ActivationBatches) -> None:
        """Open or make the file, for sets of the shapes of `like`."""
        self.path = path
        self.slots = slots
        self.shapes = like.shapes
        self.bytes = like.bytes
        path.touch()

    def put(self, number: int, batches: Iterable[torch.Tensor]) -> None:
        """Store a set; it is on the disk at the end."""
        with self.path.open("r+b") as file:
            file.seek(number % self.slots * self.bytes)
            for batch in batches:
                file.write(batch.contiguous().numpy().data)
            file.flush()
            os.fsync(file.fileno())

    def get(self, number: int) -> Iterator[torch.Tensor]:
        """Yield a set's batches."""
        with self.path.open("rb") as file:
            file.seek(number % self.slots * self.bytes)
            for shape in self.shapes:
                yield read_tensor(file, shape)

    def batch(self, number: int, index: int) -> torch.Tensor:
        """Return one batch of a set."""
        before = sum(4 * int(np.prod(shape)) for shape in self.shapes[:index])
        with self.path.open("rb") as file:
            file.seek(number % self.slots * self.bytes + before)
            return read_tensor(file, self.shapes[index])
