"""Which layer of the checkpoint each tensor of a converter's file came from, found by its values.

Converters rename tensors, reorder rows for llama.cpp's rotary embedding, put several weights into
one and one into several, and stack experts. What stays is a row of weights: it multiplies the same
input. So a tensor whose rows are rows of calibrated layers has their importance, and one whose
columns are a layer's has it in their order.
"""

from typing import Any

import numpy as np

from quantline.model.checkpoint import Checkpoint
from quantline.model.gguf_checkpoint import GgufCheckpoint

SEED = 0
Digests = np.ndarray  # uint64 [rows]: equal rows have equal ones


def row_digests(matrix: np.ndarray) -> Digests:
    """Return a number for each row of a matrix, float32 [rows, width]: a random sum of its bits."""
    bits = np.ascontiguousarray(matrix, np.float32).view(np.uint32)
    factors = np.random.default_rng(SEED).integers(1, 2**63, bits.shape[1], np.uint64)
    digests = np.empty(len(bits), np.uint64)
    for start in range(0, len(bits), 1024):  # the products of all rows would be large
        part = bits[start : start + 1024].astype(np.uint64)
        digests[start : start + 1024] = (part * factors).sum(1, dtype=np.uint64)
    return digests


class _Weights:
    """The matrices of one block of the checkpoint, by the width of their rows."""

    def __init__(self, checkpoint: Checkpoint, names: list[str]) -> None:
        self.checkpoint = checkpoint
        self.digests: dict[int, dict[str, Digests]] = {}
        for name in names:
            if not name.endswith(".weight") or len(checkpoint.shape(name)) != 2:
                continue
            values = checkpoint.tensor(name)
            layer = name.removesuffix(".weight")
            self.digests.setdefault(values.shape[1], {})[layer] = np.sort(row_digests(values))

    def origin(self, matrix: np.ndarray, taken: set[str]) -> dict[str, Any] | None:
        """Return the layer that a matrix came from, and whether it is that layer's whole weight.

        Args:
            matrix: float32 [rows, width].
            taken: The layers that other matrices are the whole of; this one is added.
        """
        digests = np.sort(row_digests(matrix))
        layers = self.digests.get(matrix.shape[1], {})
        equal = [layer for layer, known in layers.items() if np.array_equal(known, digests)]
        for layer in sorted(equal, key=lambda layer: layer in taken):
            taken.add(layer)
            return {"layer": layer, "whole": True}
        # Rows of several layers that read one input, or some of one layer's.
        found = np.zeros(len(digests), bool)
        most = (0, "")
        for layer, known in layers.items():
            here = np.isin(digests, known)
            most = max(most, (int(here.sum()), layer))
            found |= here
        if found.all():
            return {"layer": most[1], "whole": False}
        return self._by_columns(matrix, taken)

    def _by_columns(self, matrix: np.ndarray, taken: set[str]) -> dict[str, Any] | None:
        """Return the layer whose columns a matrix has in another order."""
        digests = row_digests(matrix.T)
        order = np.argsort(digests)
        for layer, known in self.digests.get(matrix.shape[1], {}).items():
            if layer in taken or len(known) != len(matrix):
                continue
            theirs = row_digests(self.checkpoint.tensor(f"{layer}.weight").T)
            their_order = np.argsort(theirs)
            if np.array_equal(digests[order], theirs[their_order]):
                taken.add(layer)
                columns = np.empty_like(order)
                columns[order] = their_order
                return {"layer": layer, "whole": False, "columns": columns.tolist()}
        return None


def find_origins(converted: GgufCheckpoint) -> dict[str, dict[str, Any]]:
    """Return for each matrix of a converter's file where its rows are from.

    Returns:
        Name → {layer: the checkpoint's module whose input it multiplies, whole: whether it has that
        module's rows, each once, columns: the checkpoint's columns in its order, where that is
        another}. Those whose rows are none of the checkpoint's are left out.
    """
    checkpoint = converted.checkpoint
    by_block: dict[int | None, list[str]] = {}
    for name in checkpoint.names:
        by_block.setdefault(checkpoint.arch.layer_index(name), []).append(name)
    matrices: dict[int | None, list[str]] = {}
    for name in converted.names:
        if name.endswith(".weight") and len(converted.shape(name)) >= 2:
            matrices.setdefault(converted.arch.layer_index(name), []).append(name)
    origins = {}
    for block, names in matrices.items():
        weights = _Weights(checkpoint, by_block.get(block, []))
        taken: set[str] = set()
        for name in names:
            values = converted.tensor(name)
            origin = weights.origin(values.reshape(-1, values.shape[-1]), taken)
            if origin is not None:
                origins[name] = origin
    return origins
