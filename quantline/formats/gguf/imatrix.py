"""Importance matrices in the file format of llama.cpp's tool llama-imatrix (tools/imatrix/imatrix.cpp).

For each tensor of a GGUF file, by its name there: the sum of the squares of its inputs, `<name>.in_sum2` float32
[matrices, width], and how many tokens it saw, `<name>.counts` float32 [matrices, 1]. Experts are matrices of one
tensor.
"""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from quantline.errors import Failure, StageError

FILE = "imatrix.gguf"


@dataclass(frozen=True)
class Entry:
    """sums float32 [matrices, width], of squares of the inputs; counts float32 [matrices] of tokens."""

    sums: np.ndarray
    counts: np.ndarray

    def values(self) -> np.ndarray:
        """The mean squares float32 [matrices, width], as llama-quantize works them out; 1 where a matrix saw nothing."""
        seen = np.where(self.counts > 0, self.counts, 1)[:, None]
        return np.where(self.counts[:, None] > 0, self.sums / seen, np.float32(1)).astype(np.float32)


@dataclass(frozen=True)
class ImportanceMatrix:
    """Entries by name of the tensor in the file; the texts, and how many chunks of how many tokens were read."""

    entries: dict[str, Entry]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int


def write(path: Path, matrix: ImportanceMatrix, architecture: str) -> None:
    """Write the file that `llama-quantize --imatrix` takes."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(matrix.datasets))
    writer.add_uint32("imatrix.chunk_count", matrix.chunks)
    writer.add_uint32("imatrix.chunk_size", matrix.chunk_size)
    for name, entry in sorted(matrix.entries.items()):
        writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(entry.sums, np.float32))
        writer.add_tensor(f"{name}.counts", np.ascontiguousarray(entry.counts, np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path) -> ImportanceMatrix:
    """Read and check such a file. Raises StageError: missing_file, importance_invalid."""
    if not path.is_file():
        raise StageError(Failure.MISSING_FILE, f"expected an importance matrix at {path}, found no such file")
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: (tensor.tensor_type.name, np.array(tensor.data)) for tensor in reader.tensors}
    except Exception as error:  # noqa: BLE001  the reader fails in as many ways as a file can be damaged
        raise _invalid(path, f"a GGUF file of llama-imatrix, found one that cannot be read: {error}") from None
    wanted = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
    if fields.get("general.type") != "imatrix" or any(key not in fields for key in wanted):
        raise _invalid(path, f"general.type imatrix, {', '.join(wanted)}, found "
                             f"general.type {fields.get('general.type')!r}")
    names = sorted({name.rsplit(".", 1)[0] for name in tensors if name.endswith((".in_sum2", ".counts"))})
    if not names:
        raise _invalid(path, "entries, found none")
    entries = {name: _entry(path, name, tensors) for name in names}
    return ImportanceMatrix(entries, tuple(fields["imatrix.datasets"]), int(fields["imatrix.chunk_count"]),
                            int(fields["imatrix.chunk_size"]))


def _entry(path: Path, name: str, tensors: dict[str, tuple[str, np.ndarray]]) -> Entry:
    parts = []
    for part in ("in_sum2", "counts"):
        kind, values = tensors.get(f"{name}.{part}", ("no tensor", np.zeros(0)))
        if kind != "F32":
            raise _invalid(path, f"{name}.{part} in F32, found {kind}")
        if not ((values >= 0) & np.isfinite(values)).all():  # false for NaN
            raise _invalid(path, f"finite numbers that are not negative in {name}.{part}, found NaN, infinity or a "
                                 "negative one")
        parts.append(values)
    sums, counts = np.atleast_2d(parts[0]), parts[1].reshape(-1)
    if sums.shape[0] != len(counts):
        raise _invalid(path, f"as many counts as matrices of {name}, found {len(counts)} and {sums.shape[0]}")
    if not counts.max(initial=0) > 0:
        raise _invalid(path, f"tokens that {name} saw, found none")
    return Entry(sums.astype(np.float32), counts.astype(np.float32))


def _invalid(path: Path, what: str) -> StageError:
    return StageError(Failure.IMPORTANCE_INVALID, f"expected {what} in {path}; make the importance matrix again")
