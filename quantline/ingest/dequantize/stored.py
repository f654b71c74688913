"""Tensors of a quantized checkpoint as they are stored, in any dtype, one at a time.

numpy has no 8-bit floats of its own, and safetensors hands them to torch alone. Here a tensor's
bytes are mapped from its file and seen as what the header says.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from quantline.model.checkpoint_files import weight_map

PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What safetensors calls a dtype → numpy's. Two 4-bit floats share a byte.
DTYPES = PLAIN | {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F4": np.dtype(np.uint8),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "BOOL": np.dtype(np.bool_),
}


class Entry(NamedTuple):
    """Where a tensor lies: its file, dtype as safetensors names it, shape, first byte and size."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class StoredTensors:
    """The tensors of a checkpoint's folder.

    Raises:
        StageError: As `weight_map` does, which has safetensors check every header.
    """

    def __init__(self, folder: Path) -> None:
        """Read the names of all tensors."""
        self.folder = folder
        self.files = weight_map(folder)
        self.names = sorted(self.files)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    @cached_property
    def _headers(self) -> dict[str, Entry]:
        """Name → where the tensor lies."""
        entries = {}
        for path in sorted(set(self.files.values())):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    shape = tuple(entry["shape"])
                    place = (8 + length + start, end - start)
                    entries[name] = Entry(path, entry["dtype"], shape, *place)
        return entries

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as safetensors names it."""
        return self._headers[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape as its header has it."""
        return self._headers[name].shape

    def octets(self, name: str) -> np.ndarray:
        """Return a tensor's bytes, uint8 [n], mapped from the file."""
        entry = self._headers[name]
        if not entry.size:
            return np.empty(0, np.uint8)
        return np.memmap(entry.path, np.uint8, "r", entry.start, (entry.size,))

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as it is stored; of F4 the bytes, [..., n / 2]."""
        entry = self._headers[name]
        shape = entry.shape
        if entry.dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        return self.octets(name).view(DTYPES[entry.dtype]).reshape(shape)
