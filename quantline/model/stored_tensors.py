"""The tensors of safetensors files by their names, read one at a time, without torch.

A file's header lists all of its tensors, thousands in a mixture; so a file stays open for the next
tensor instead of having its header read again for each.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # it also gives numpy the bfloat16 that safetensors hands over
import numpy as np
from safetensors import safe_open

from quantline.model.dtypes import NUMPY_DTYPES

# Pages of a file count as the process's memory until it is closed; after so many bytes it is.
BYTES_BEFORE_CLOSING = 1 << 26
WIDEST = 8  # bytes of a value


class _Opened(NamedTuple):
    """A file that is open: its reader, and how many bytes may still be read before it is closed."""

    reader: Any
    left: int


class StoredTensors:
    """Tensors of several files."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """Note where tensors are; nothing is read yet.

        Args:
            files: Tensor → its file.
        """
        self.files = files
        self._opened: dict[Path, _Opened] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor in its file."""
        return self._header(key)[0]

    def dtype(self, key: str) -> str:
        """Return the dtype on disk as safetensors names it: F32, F16, BF16."""
        return self._header(key)[1]

    def read(self, key: str) -> np.ndarray:
        """Return a tensor as it is stored."""
        shape, dtype = self._header(key)
        if dtype == "F8_E4M3":
            return self._read_float8(key)
        reader = self._reader(key)
        # A slice is copied once, a whole tensor twice; nothing can be sliced out of nothing.
        can_slice = bool(shape) and 0 not in shape
        return reader.get_slice(key)[:] if can_slice else reader.get_tensor(key)

    def read_rows(self, key: str, start: int, end: int) -> np.ndarray:
        """Return some rows of a tensor's first dimension; a tensor without any as it is."""
        if not self.shape(key):
            return self.read(key)
        rows: np.ndarray = self._reader(key).get_slice(key)[start:end]
        return rows

    def _read_float8(self, key: str) -> np.ndarray:
        """Return a tensor of a type that safetensors hands to torch alone."""
        import torch

        with safe_open(self.files[key], "pt") as file:
            values = file.get_tensor(key).view(torch.uint8).numpy()
        return values.view(ml_dtypes.float8_e4m3fn)

    def _header(self, key: str) -> tuple[tuple[int, ...], str]:
        if key not in self._headers:
            path = self.files[key]
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118 (a file is no dict)
                    if self.files.get(name) == path:  # two files may hold one tensor
                        stored = file.get_slice(name)
                        self._headers[name] = (tuple(stored.get_shape()), stored.get_dtype())
        return self._headers[key]

    def _reader(self, key: str) -> Any:
        """Return the reader of the file that a tensor is in."""
        path = self.files[key]
        shape, dtype = self._header(key)
        size = prod(shape) * (NUMPY_DTYPES[dtype].itemsize if dtype in NUMPY_DTYPES else WIDEST)
        opened = self._opened.get(path)
        if opened is None or opened.left <= 0:
            opened = _Opened(safe_open(path, "np"), BYTES_BEFORE_CLOSING)
        self._opened[path] = opened._replace(left=opened.left - size)
        return opened.reader
