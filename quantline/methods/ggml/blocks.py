"""ggml's blocks of quantized weights, unpacked into their fields (ggml-common.h, ggml-quants.c).

A block is a run of weights of one row, divided into sub-blocks. A weight is
scale · level - minimum, where scale and minimum are those of its sub-block: small integers times
the block's d and dmin. A code is the index of a level, as it is stored.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType


@dataclass(frozen=True)
class Blocks:
    """The fields of n blocks of one type.

    A type without minima has them 0; one without sub-blocks has one, with the scale 1 and the
    minimum 1.

    Attributes:
        codes: uint8 [n, block size].
        scales: int16 [n, sub-blocks].
        minima: int16 [n, sub-blocks].
        d: What the scales are multiplied by, float16 [n, 1].
        dmin: What the minima are multiplied by, float16 [n, 1].
    """

    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray
    d: np.ndarray
    dmin: np.ndarray

    @property
    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """(scale, minimum) of each sub-block, float32 [n, sub-blocks], as ggml multiplies them."""
        scale = self.d.astype(np.float32) * self.scales.astype(np.float32)
        minimum = self.dmin.astype(np.float32) * self.minima.astype(np.float32)
        return scale, minimum

    def fields(self) -> tuple[np.ndarray, ...]:
        """Return codes, scales, minima, d and dmin."""
        return self.codes, self.scales, self.minima, self.d, self.dmin


@dataclass(frozen=True)
class BlockType:
    """One of ggml's block types: its levels, the ranges of its fields, and its codec.

    Attributes:
        name: ggml's name, such as "Q4_K".
        sub_block_size: Neighbouring weights that share a scale.
        levels: What the codes stand for, float32, rising.
        scale_range: The least and the greatest integer scale; None where d alone is the scale.
        largest_minimum: The greatest integer minimum; 0 where dmin alone is the minimum, None where
            there is none.
        unpack: Turns uint8 [n, block bytes] into n blocks.
        pack: The inverse of `unpack`.
        lowest_code: The least code that is used.
    """

    name: str
    sub_block_size: int
    levels: np.ndarray
    scale_range: tuple[int, int] | None
    largest_minimum: int | None
    unpack: Callable[[np.ndarray], Blocks] = field(repr=False)
    pack: Callable[[Blocks], np.ndarray] = field(repr=False)
    lowest_code: int = 0

    @property
    def block_size(self) -> int:
        """Weights in a block."""
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.name]][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.name]][1]

    @property
    def is_uniform(self) -> bool:
        """Whether the levels are neighbouring whole numbers."""
        return bool((np.diff(self.levels) == 1).all())

    def dequantize(self, blocks: Blocks) -> np.ndarray:
        """Return the weights, float32 [n, block size], bit for bit as ggml's dequantize_row."""
        scale, minimum = blocks.grid
        levels = self.levels[blocks.codes].reshape(len(blocks.codes), -1, self.sub_block_size)
        weights = scale[:, :, None] * levels - minimum[:, :, None]
        return weights.reshape(blocks.codes.shape)


def pack_fields(fields: np.ndarray, bits: int) -> np.ndarray:
    """Pack small integers into bytes.

    Args:
        fields: uint8 [n, groups, count, m], each less than 2^bits. Field k of a group lies
            bits · k up in the group's bytes.
        bits: Bits of a field.

    Returns:
        uint8 [n, groups · m].
    """
    shifts = bits * np.arange(fields.shape[2], dtype=np.uint8)
    shifted = fields.astype(np.uint8) << shifts[:, None]
    return np.bitwise_or.reduce(shifted, axis=2).reshape(len(fields), -1)


def unpack_fields(data: np.ndarray, groups: int, count: int, bits: int) -> np.ndarray:
    """Unpack small integers from bytes: the inverse of `pack_fields`.

    Args:
        data: uint8 [n, groups · m].
        groups: Groups of bytes.
        count: Fields in one byte.
        bits: Bits of a field.

    Returns:
        uint8 [n, groups, count, m].
    """
    shifts = (bits * np.arange(count, dtype=np.uint8))[:, None]
    mask = np.uint8((1 << bits) - 1)
    return (data.reshape(len(data), groups, 1, -1) >> shifts) & mask


def as_float16(data: np.ndarray) -> np.ndarray:
    """Read float16 [n, 1] from bytes [n, 2]."""
    return np.ascontiguousarray(data).view(np.float16)


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Return the bytes [n, 2] of float16 [n, 1]."""
    return values.view(np.uint8)
