"""Writing safetensors one tensor after another, so that a file may be larger than memory.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of the header, a
JSON header that may end in spaces, then the tensors without gaps. Room for the header is kept at
the start and filled in at the end.
"""

import json
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

DTYPE_NAMES = {
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint8): "U8",
    # Of buffers that old checkpoints store, such as masks.
    np.dtype(np.bool_): "BOOL",
    np.dtype(np.int64): "I64",
    np.dtype(np.float64): "F64",
}
ENTRY_BYTES = 128  # of the header for each tensor, besides its name
ALIGNMENT = 8


class SafetensorsWriter:
    """A context manager; the file is complete when the block ends well."""

    def __init__(self, path: Path, names: list[str]) -> None:
        """Open nothing yet.

        Args:
            path: The file to write.
            names: The tensors that may be added; fewer may.
        """
        self.path = path
        needed = ENTRY_BYTES + sum(len(json.dumps(name)) + ENTRY_BYTES for name in names)
        self.room = -(-needed // ALIGNMENT) * ALIGNMENT
        self.header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        self.end = 0

    def __enter__(self) -> Self:
        self.file = self.path.open("wb")
        self.file.write(bytes(8 + self.room))
        return self

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Append a tensor. Raises ValueError for a name that came before."""
        if name in self.header:
            raise ValueError(f"expected {name} once, found it twice")
        self.file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        self.header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.end, self.end + tensor.nbytes],
        }
        self.end += tensor.nbytes

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            header = json.dumps(self.header, separators=(",", ":")).encode()
            if len(header) > self.room:
                raise ValueError(
                    f"expected a header of at most {self.room} bytes, found {len(header)}"
                )
            self.file.seek(0)
            self.file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self.file.close()
