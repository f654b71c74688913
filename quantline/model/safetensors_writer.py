"""Writing safetensors one tensor after another, so that a file may be larger than memory.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of the header, a JSON header that may
end in spaces, then the tensors without gaps. Room for the header is kept at the start and filled in at the end.
"""

import json
from pathlib import Path
from typing import Self

import ml_dtypes
import numpy as np

DTYPES = {np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32",
          np.dtype(np.int32): "I32", np.dtype(np.uint8): "U8"}
ENTRY = 128  # bytes of header for each tensor beside its name


class SafetensorsStream:
    """A context manager: `add` tensors in any order; the file is complete when the block ends well."""

    def __init__(self, path: Path, names: list[str]) -> None:
        """`names` are the tensors that may come; fewer may."""
        self.path = path
        self.room = -(-(sum(len(json.dumps(name)) + ENTRY for name in names) + ENTRY) // 8) * 8
        self.header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
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
        self.header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                             "data_offsets": [self.end, self.end + tensor.nbytes]}
        self.end += tensor.nbytes

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            header = json.dumps(self.header, separators=(",", ":")).encode()
            if len(header) > self.room:
                raise ValueError(f"expected a header of at most {self.room} bytes, found {len(header)}")
            self.file.seek(0)
            self.file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self.file.close()
