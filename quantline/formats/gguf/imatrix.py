"""Importance matrices in the file format of llama.cpp's llama-imatrix (tools/imatrix/imatrix.cpp).

For each tensor of a GGUF file, by its name there, such a file has the sum of the squares of its
inputs, `<name>.in_sum2` float32 [matrices, width], and how many tokens it was given,
`<name>.counts` float32 [matrices, 1]. Experts are matrices of one tensor.
"""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from quantline.causes import raise_if_of_machine
from quantline.errors import Failure, StageError

FILE = "imatrix.gguf"
REQUIRED_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")

Tensors = dict[str, tuple[str, np.ndarray]]  # name → type and values


@dataclass(frozen=True)
class Entry:
    """The importance of one tensor's inputs.

    Attributes:
        sums: Of the squares of the inputs, float32 [matrices, width].
        counts: Of tokens, float32 [matrices].
    """

    sums: np.ndarray
    counts: np.ndarray

    def values(self) -> np.ndarray:
        """Return the mean squares, float32 [matrices, width], as llama-quantize computes them.

        They are 1 for a matrix that was given no token.
        """
        counted = self.counts > 0
        divisors = np.where(counted, self.counts, 1)[:, None]
        means = np.where(counted[:, None], self.sums / divisors, np.float32(1))
        return means.astype(np.float32)


@dataclass(frozen=True)
class ImportanceMatrix:
    """The importance of all inputs of a model.

    Attributes:
        entries: By the tensor's name in the GGUF file.
        datasets: The texts that were read.
        chunks: How many chunks of them.
        chunk_size: Tokens of a chunk.
    """

    entries: dict[str, Entry]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int


def write_importance(path: Path, matrix: ImportanceMatrix, architecture: str) -> None:
    """Write the file that `llama-quantize --imatrix` takes.

    Args:
        path: The file to write.
        matrix: What it has to hold.
        architecture: llama.cpp's name for that of the model.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(matrix.datasets))
    writer.add_uint32("imatrix.chunk_count", matrix.chunks)
    writer.add_uint32("imatrix.chunk_size", matrix.chunk_size)
    for name, entry in sorted(matrix.entries.items()):
        counts = np.ascontiguousarray(entry.counts, np.float32)[:, None]
        writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(entry.sums, np.float32))
        writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_importance(path: Path) -> ImportanceMatrix:
    """Read and check such a file.

    Raises:
        StageError: missing_file, importance_invalid.
    """
    if not path.is_file():
        raise StageError(
            Failure.MISSING_FILE,
            f"expected an importance matrix at {path}, found no such file; give its path",
        )
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        tensors: Tensors = {}
        for tensor in reader.tensors:
            tensors[tensor.name] = (tensor.tensor_type.name, np.array(tensor.data))
    except Exception as error:  # the reader fails in as many ways as a file can be damaged
        raise_if_of_machine(error)
        raise _invalid(
            path, f"a GGUF file of llama-imatrix, found one that cannot be read: {error}"
        ) from None
    kind = fields.get("general.type")
    missing = [key for key in REQUIRED_KEYS if key not in fields]
    if kind != "imatrix" or missing:
        without = f" without {', '.join(missing)}" if missing else ""
        raise _invalid(
            path,
            f"general.type imatrix with {', '.join(REQUIRED_KEYS)}, found {kind!r}{without}",
        )
    entries = {}
    for name in sorted(tensors):
        matrix, _, part = name.rpartition(".")
        if part in ("in_sum2", "counts") and matrix not in entries:
            entries[matrix] = _entry(path, matrix, tensors)
    if not entries:
        raise _invalid(path, "entries, found none")
    return ImportanceMatrix(
        entries,
        tuple(fields["imatrix.datasets"]),
        int(fields["imatrix.chunk_count"]),
        int(fields["imatrix.chunk_size"]),
    )


def _entry(path: Path, name: str, tensors: Tensors) -> Entry:
    """Return the entry of one tensor, whose numbers make sense."""
    sums = np.atleast_2d(_numbers(path, f"{name}.in_sum2", tensors))
    counts = _numbers(path, f"{name}.counts", tensors).reshape(-1)
    if len(sums) != len(counts):
        raise _invalid(
            path, f"as many counts as matrices of {name}, found {len(counts)} and {len(sums)}"
        )
    if not counts.max(initial=0) > 0:
        raise _invalid(path, f"tokens that {name} was given, found none")
    return Entry(sums.astype(np.float32), counts.astype(np.float32))


def _numbers(path: Path, name: str, tensors: Tensors) -> np.ndarray:
    """Return a tensor of finite numbers that are not negative."""
    kind, values = tensors.get(name, ("no tensor", np.zeros(0)))
    if kind != "F32":
        raise _invalid(path, f"{name} in F32, found {kind}")
    if not ((values >= 0) & np.isfinite(values)).all():  # false for NaN
        raise _invalid(
            path,
            f"finite numbers that are not negative in {name}, found NaN, infinity or a negative "
            "one",
        )
    return values


def _invalid(path: Path, expected: str) -> StageError:
    return StageError(
        Failure.IMPORTANCE_INVALID,
        f"expected {expected} in {path}; make the importance matrix again",
    )
