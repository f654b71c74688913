"""Kinds of quantized weights, by how they are stored.

A method with a kind of its own registers it (quantline.quantized.storages), and a container that
can hold it says so in its `ContainerInfo.carries`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import ml_dtypes
import numpy as np

from quantline.errors import Failure, StageError


class Scheme(NamedTuple):
    """What layers of one layout have to share.

    Attributes:
        kind: What one weight is stored as, such as "int4".
        symmetric: Whether the zero point is fixed.
        group_size: Weights that share a scale.
        per_row: Whether a group is the whole row.
    """

    kind: str
    symmetric: bool
    group_size: int
    per_row: bool


class QuantizedTensor(Protocol):
    """A quantized weight [out, in].

    Life cycle: a method makes one; QuantizedWriter stores `parts()` with `describe()`; a container
    reads it back through `from_parts()` and writes it in its own layout, or `dequantize()`s it.
    """

    storage: ClassVar[str]

    @property
    def kind(self) -> str:
        """What one weight is stored as, such as "int4"."""

    @property
    def scheme(self) -> Scheme:
        """What layers of one layout have to share."""

    def describe(self) -> dict[str, Any]:
        """Return what quantized.json says of it; enough for `from_parts`."""

    def parts(self) -> dict[str, np.ndarray]:
        """Return the arrays that it consists of, in dtypes that safetensors stores."""

    @classmethod
    def from_parts(cls, read: Callable[[str], np.ndarray], entry: dict[str, Any]) -> Self:
        """Restore it from its parts, read by name, and from what `describe` said."""

    def dequantize(self) -> np.ndarray:
        """Return the weight that it stands for, float32 [out, in]."""


@dataclass(frozen=True)
class GroupedLinear:
    """Integers in groups, which stand for (integers - zeros) * scales.

    A group is `group_size` neighbouring inputs of one output. The scales are values that bfloat16
    holds exactly.

    Attributes:
        integers: uint8 [out, in], from 0 to 2^bits - 1.
        scales: float32 [out, groups].
        zeros: uint8 [out, groups].
    """

    storage: ClassVar[str] = "grouped"

    integers: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    bits: int
    group_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        """Check shapes and ranges. Raises ValueError; StageError(non_finite)."""
        rows, columns = self.integers.shape
        groups = (rows, columns // self.group_size)
        shapes = (self.scales.shape, self.zeros.shape)
        if columns % self.group_size or shapes != (groups, groups):
            raise ValueError(f"expected scales and zeros {groups}, found {shapes}")
        if not np.isfinite(self.scales).all():
            raise StageError(
                Failure.NON_FINITE, "a scale is not finite; look at the weights of this layer"
            )
        limit = 1 << self.bits
        if self.integers.max(initial=0) >= limit or self.zeros.max(initial=0) >= limit:
            raise ValueError(f"an integer or zero point does not fit {self.bits} bits")

    @property
    def kind(self) -> str:
        """What one weight is stored as."""
        return f"int{self.bits}"

    @property
    def scheme(self) -> Scheme:
        """What layers of one layout have to share."""
        return self.scheme_of(self.describe(), self.integers.shape[1])

    @staticmethod
    def scheme_of(entry: dict[str, Any], columns: int) -> Scheme:
        """Return the scheme of a layer by what `describe` said, and by its inputs."""
        group_size = entry["group_size"]
        per_row = group_size == columns
        return Scheme(f"int{entry['bits']}", entry["symmetric"], group_size, per_row)

    def in_groups_of(self, size: int) -> Self:
        """Return the same weight in smaller groups: the parts of a group repeat its scale.

        Args:
            size: Divides the group size.
        """
        repeats = self.group_size // size
        if repeats == 1:
            return self
        scales = np.repeat(self.scales, repeats, 1)
        return replace(
            self, scales=scales, zeros=np.repeat(self.zeros, repeats, 1), group_size=size
        )

    def describe(self) -> dict[str, Any]:
        """Return what quantized.json says of it."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
        }

    def parts(self) -> dict[str, np.ndarray]:
        """Return integers, scales and zeros."""
        return {"integers": self.integers, "scales": self.scales, "zeros": self.zeros}

    @classmethod
    def from_parts(cls, read: Callable[[str], np.ndarray], entry: dict[str, Any]) -> Self:
        """Restore it from its parts."""
        return cls(
            read("integers"),
            read("scales"),
            read("zeros"),
            entry["bits"],
            entry["group_size"],
            entry["symmetric"],
        )

    def dequantize(self) -> np.ndarray:
        """Return the weight that the integers stand for, float32 [out, in]."""
        rows, columns = self.integers.shape
        grouped = self.integers.reshape(rows, -1, self.group_size).astype(np.float32)
        steps = grouped - self.zeros[:, :, None]
        return (steps * self.scales[:, :, None]).reshape(rows, columns)


@dataclass(frozen=True)
class FloatLinear:
    """Eight-bit floats times a scale per row.

    Attributes:
        values: float8_e4m3fn [out, in].
        scales: float32 [out, 1], values that bfloat16 holds exactly.
    """

    storage: ClassVar[str] = "float8"
    kind: ClassVar[str] = "float8"

    values: np.ndarray
    scales: np.ndarray

    def __post_init__(self) -> None:
        """Check that all is finite. Raises StageError(non_finite)."""
        finite = np.isfinite(self.scales).all()
        if not (finite and np.isfinite(self.values.astype(np.float32)).all()):
            raise StageError(
                Failure.NON_FINITE, "a value is not finite; look at the weights of this layer"
            )

    @property
    def scheme(self) -> Scheme:
        """What layers of one layout have to share."""
        return Scheme(self.kind, True, self.values.shape[1], True)

    def describe(self) -> dict[str, Any]:
        """Return what quantized.json says of it."""
        return {"kind": self.kind}

    def parts(self) -> dict[str, np.ndarray]:
        """Return values and scales."""
        return {"values": self.values.view(np.uint8), "scales": self.scales}

    @classmethod
    def from_parts(cls, read: Callable[[str], np.ndarray], entry: dict[str, Any]) -> Self:
        """Restore it from its parts."""
        return cls(read("values").view(ml_dtypes.float8_e4m3fn), read("scales"))

    def dequantize(self) -> np.ndarray:
        """Return the weight that it stands for, float32 [out, in]."""
        return self.values.astype(np.float32) * self.scales


@dataclass(frozen=True)
class GgmlBlocks:
    """A tensor of a GGUF file in ggml's blocks.

    Attributes:
        type: ggml's name for the block type, such as "Q4_K".
        data: uint8 [rows, bytes per row].
        shape: Of the tensor that the blocks stand for.
    """

    type: str
    data: np.ndarray
    shape: tuple[int, ...]
