"""Sums over the tokens of a text, part by part, so that workers can share the text.

A text is at most PARTS parts, whoever sums them up: within a part batch by batch, then, each
rounded to single precision, part by part. So the statistics have the same bits for any number of
workers.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import torch

PARTS = 8
ROWS = 256  # that are stored or rounded at once


class Sums(Protocol):
    """Sums over some tokens of one layer."""

    def add(self, other: Self) -> None:
        """Add those over further tokens."""

    def narrow(self) -> None:
        """Round matrices to single precision."""

    def finish(self) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
        """Return what is stored of a whole text: second moments, and more by name."""

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the sums as they are, for `of`."""

    @classmethod
    def of(cls, tensors: dict[str, np.ndarray]) -> Self:
        """Return the sums that were stored as `tensors`."""


SumsType = TypeVar("SumsType", bound=Sums)


class LayerSums(Generic[SumsType]):
    """The sums of the layers of the block that runs now.

    Attributes:
        keep: Called as keep(layer, moments, **more) with what is finished.
        raw: Whether `keep` gets sums as they are, in place of moments None.
    """

    def __init__(self, keep: Callable[..., None], raw: bool) -> None:
        """Begin without any."""
        self.keep = keep
        self.raw = raw
        self._parts: dict[str, SumsType] = {}  # of the part that runs now
        self._before: dict[str, SumsType] = {}  # of the parts before

    def of(self, layer: str, make: Callable[[], SumsType]) -> SumsType:
        """Return the sums of a layer over the part that runs now."""
        if layer not in self._parts:
            self._parts[layer] = make()
        return self._parts[layer]

    def end_part(self) -> None:
        """Add the part that ran to those before."""
        for layer, sums in self._parts.items():
            sums.narrow()
            if layer in self._before:
                self._before[layer].add(sums)
            else:
                self._before[layer] = sums
        self._parts = {}

    def close(self, before: Callable[[str, SumsType], None] | None = None) -> None:
        """Hand over the sums of all layers.

        Args:
            before: Called with each layer and its sums first.
        """
        self.end_part()
        for layer in sorted(self._before):
            sums = self._before.pop(layer)
            if before:
                before(layer, sums)
            if self.raw:
                self.keep(layer, None, **sums.tensors())
            else:
                moments, more = sums.finish()
                del sums  # as large as two of what is kept
                self.keep(layer, moments, **more)


def parts_of(batches: int) -> list[range]:
    """Return which batches each part of a text has."""
    bounds = np.linspace(0, batches, min(batches, PARTS) + 1).round().astype(int).tolist()
    return [range(*bound) for bound in pairwise(bounds)]


def last_batches(batches: int) -> frozenset[int]:
    """Return the numbers of the batches with which a part ends."""
    return frozenset(part[-1] for part in parts_of(batches))


def narrow(matrix: torch.Tensor) -> None:
    """Round a float64 matrix to single precision, in place."""
    for rows in matrix.split(ROWS):
        rows.copy_(rows.float())


def pack_upper(matrix: torch.Tensor) -> np.ndarray:
    """Return what lies on and above the diagonal of [n, n], float32, and a little of the rest."""
    rows = range(0, len(matrix), ROWS)
    parts = [matrix[start : start + ROWS, start:].reshape(-1).float() for start in rows]
    return torch.cat(parts).cpu().numpy()


def unpack_upper(values: np.ndarray, width: int) -> torch.Tensor:
    """Return the float64 [width, width] that was packed; below the diagonal are zeros."""
    matrix = torch.zeros(width, width, dtype=torch.float64)
    packed = torch.from_numpy(values)
    taken = 0
    for start in range(0, width, ROWS):
        rows = matrix[start : start + ROWS, start:]
        rows.copy_(packed[taken : taken + rows.numel()].reshape(rows.shape))
        taken += rows.numel()
    return matrix
