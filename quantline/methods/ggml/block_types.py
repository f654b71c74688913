"""ggml's blocks of quantized weights, taken apart and put together again bit for bit (ggml-common.h, ggml-quants.c).

A block is `size` weights of one row in sub-blocks of `sub`. A weight is scale · level - minimum, where scale and
minimum are those of its sub-block: small integers times the block's d and dmin. A code is the index of a level, as it
is stored.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants


@dataclass(frozen=True)
class Blocks:
    """n blocks: codes uint8 [n, size], scales and minima int16 [n, sub-blocks], d and dmin float16 [n, 1].

    A type without minima has them 0; one without sub-blocks has one, with the scale 1 and the minimum 1.
    """

    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray
    d: np.ndarray
    dmin: np.ndarray

    @property
    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """(scale, minimum) of each sub-block, float32 [n, sub-blocks], as ggml multiplies them out."""
        return (self.d.astype(np.float32) * self.scales.astype(np.float32),
                self.dmin.astype(np.float32) * self.minima.astype(np.float32))

    def parts(self) -> tuple[np.ndarray, ...]:
        return self.codes, self.scales, self.minima, self.d, self.dmin


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types: its sizes, what its codes stand for, the range of its scales, and its codec.

    `levels` float32, rising; `lowest` is the least code that is used; `scales` the least and greatest integer scale
    (None: there are none), `minima` the greatest integer minimum (0: d and dmin alone; None: no minimum).
    """

    name: str
    sub: int
    levels: np.ndarray
    scales: tuple[int, int] | None
    minima: int | None
    unpack: Callable[[np.ndarray], Blocks] = field(repr=False)  # uint8 [n, bytes] → n blocks
    pack: Callable[[Blocks], np.ndarray] = field(repr=False)  # the inverse
    lowest: int = 0

    @property
    def size(self) -> int:
        """Weights in a block."""
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.name]][0]

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.name]][1]

    @property
    def uniform(self) -> bool:
        """Whether the levels are neighbouring whole numbers."""
        return bool((np.diff(self.levels) == 1).all())

    def dequantize(self, blocks: Blocks) -> np.ndarray:
        """The weights, float32 [n, size], bit for bit as ggml's dequantize_row gives them."""
        scale, minimum = (part[:, :, None] for part in blocks.grid)
        levels = self.levels[blocks.codes].reshape(len(blocks.codes), -1, self.sub)
        return (scale * levels - minimum).reshape(blocks.codes.shape)


def block_type(name: str) -> BlockType:
    """The type of that name. Raises KeyError for one that has no codec (F16 and F32, for example)."""
    return _types()[name]


def dequantize(data: np.ndarray, name: str) -> np.ndarray:
    """The weights, float32 [rows, width], that ggml blocks uint8 [rows, bytes per row] of any type stand for."""
    kind = _types().get(name)
    if kind is None:  # no codec of ours
        return quants.dequantize(data, GGMLQuantizationType[name])
    return kind.dequantize(kind.unpack(data.reshape(-1, kind.bytes))).reshape(len(data), -1)


def grid_like(name: str) -> tuple[int, int, bool] | None:
    """(bits, group size, symmetric) of the plain grid that a type refines; None for one of a codebook."""
    kind = _types().get(name)
    return (int(kind.levels.size).bit_length() - 1, kind.sub, kind.minima is None) if kind and kind.uniform else None


@cache
def _types() -> dict[str, BlockType]:
    from quantline.methods.ggml import blocks_of_256 as ggml_super, blocks_of_32 as ggml_plain

    return {one.name: one for one in (*ggml_plain.TYPES, *ggml_super.TYPES)}


def join(fields: np.ndarray, bits: int) -> np.ndarray:
    """Bytes [n, groups · m] of fields uint8 [n, groups, k, m] of `bits` bits: field k of a group lies `bits · k` up."""
    moved = fields.astype(np.uint8) << (bits * np.arange(fields.shape[2], dtype=np.uint8))[:, None]
    return np.bitwise_or.reduce(moved, axis=2).reshape(len(fields), -1)


def split(data: np.ndarray, groups: int, count: int, bits: int) -> np.ndarray:
    """Fields uint8 [n, groups, count, m] of bytes [n, groups · m]: the inverse of `join`."""
    shifts = (bits * np.arange(count, dtype=np.uint8))[:, None]
    return (data.reshape(len(data), groups, 1, -1) >> shifts) & np.uint8((1 << bits) - 1)


def halves(data: np.ndarray) -> np.ndarray:
    """float16 [n, 1] of bytes [n, 2]."""
    return np.ascontiguousarray(data).view(np.float16)
