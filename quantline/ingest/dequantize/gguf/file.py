"""A GGUF file: its metadata, and its tensors one at a time."""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quantline.causes import raise_if_of_machine
from quantline.errors import Failure, StageError

FLOATS = ("F32", "F16", "BF16")
SPLIT_COUNT = "split.count"
MAGIC = b"GGUF"
UNKNOWN_TYPE = re.compile(r"(\d+)\)? is not a valid GGMLQuantizationType")


class GgufFile:
    """A file with a whole model in it.

    Raises:
        StageError: missing_shard, for a file that is damaged, cut short or one of several;
            unsupported_architecture, for a version or a type that gguf does not know.
    """

    def __init__(self, path: Path) -> None:
        """Read the header."""
        self.path = path
        self._check_start()
        try:
            self.reader = gguf.GGUFReader(path)
            self.architecture = str(self.reader.fields["general.architecture"].contents())
        except Exception as error:  # the reader fails in as many ways as a file can be damaged
            raise_if_of_machine(error)
            unknown = UNKNOWN_TYPE.search(str(error))
            if unknown is not None:
                raise self.refusal(
                    "types of tensors that gguf reads",
                    f"one of type {unknown[1]}, which is newer than this release, or was given up",
                ) from None
            raise StageError(
                Failure.MISSING_SHARD,
                f"expected a GGUF file at {path}, found one that is damaged or cut short "
                f"({type(error).__name__}: {error}); fetch it again",
            ) from None
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        parts = self.field(SPLIT_COUNT)
        if parts and parts > 1:
            raise StageError(
                Failure.MISSING_SHARD,
                f"expected a whole model in {path}, found one of {parts} parts; join them with "
                "`llama-gguf-split --merge`",
            )

    def _check_start(self) -> None:
        """Refuse a file that is none of GGUF, or of a version that is not read here."""
        with self.path.open("rb") as file:
            start = file.read(8)
        if len(start) < 8:
            return  # cut short, as the reader says
        if start[:4] != MAGIC:
            raise StageError(
                Failure.MISSING_SHARD,
                f"expected a GGUF file at {self.path}, found one that begins with {start[:4]!r} "
                f"instead of {MAGIC!r}; it is damaged or of another format, fetch it again",
            )
        version = int.from_bytes(start[4:], "little")
        swapped = int.from_bytes(start[4:], "big")
        known = gguf.gguf_reader.READER_SUPPORTED_VERSIONS
        if not {version, swapped} & set(known):
            raise self.refusal(
                f"version {' or '.join(map(str, known))} of GGUF", f"version {version}"
            )

    def refusal(self, expected: str, found: str) -> StageError:
        """Return the error for a file whose model cannot be read."""
        return StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected {expected} in {self.path}, found {found}; start from the model's Hugging "
            "Face folder",
        )

    def field(self, key: str) -> Any:
        """Return a value of the metadata; None if there is none."""
        field = self.reader.fields.get(key)
        return None if field is None else shortest(field.contents())

    def setting(self, suffix: str) -> Any:
        """Return a value of the metadata of the architecture."""
        return self.field(f"{self.architecture}.{suffix}")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All metadata of the architecture, without its name before them."""
        prefix = f"{self.architecture}."
        keys = [key for key in self.reader.fields if key.startswith(prefix)]
        return {key.removeprefix(prefix): self.field(key) for key in keys}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, of a weight [out, in]."""
        return tuple(int(side) for side in reversed(self.tensors[name].shape))

    def type_of(self, name: str) -> str:
        """Return a tensor's type as ggml names it."""
        return str(self.tensors[name].tensor_type.name)

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored as blocks."""
        return self.type_of(name) not in FLOATS

    def read(self, name: str) -> np.ndarray:
        """Return a tensor in float32, as gguf's own code dequantizes it.

        Raises:
            StageError: unsupported_architecture, for a type that the library does not know.
        """
        tensor = self.tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise self.refusal("types that gguf reads", f"{name} in {self.type_of(name)}") from None
        return values.reshape(self.shape(name)).astype(np.float32)

    def blocks(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor of blocks, uint8 [..., bytes per row]."""
        return np.array(self.tensors[name].data)

    @cached_property
    def dtype(self) -> str:
        """The float type of a plain copy: that of the matrices, or bfloat16 if they are blocks."""
        matrices = [name for name in self.tensors if len(self.shape(name)) > 1]
        types = {self.type_of(name) for name in matrices}
        if types <= {"F32"}:
            return "float32"
        return "float16" if types <= {"F32", "F16"} else "bfloat16"


def shortest(value: Any) -> Any:
    """Return a value with each float32 in it as the decimal number that people wrote."""
    if isinstance(value, float):
        narrow = np.float32(value)
        return float(str(narrow)) if float(narrow) == value else value
    if isinstance(value, list):
        return [shortest(item) for item in value]
    if isinstance(value, dict):
        return {key: shortest(item) for key, item in value.items()}
    return value


def plain_values(values: np.ndarray, dtype: np.dtype, was_float: bool) -> np.ndarray:
    """Round a tensor to the float type of the copy.

    What the file holds as floats stays in float32 where rounding would change it.
    """
    with np.errstate(over="ignore"):
        result = values.astype(dtype)
    if was_float and not np.array_equal(result.astype(np.float32), values):
        return values
    return result
