"""ggml's types of 32 weights with one scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL."""

from functools import partial

import numpy as np

from quantline.methods.ggml.blocks import (
    Blocks,
    BlockType,
    as_bytes,
    as_float16,
    pack_fields,
    unpack_fields,
)

# kvalues_iq4nl of ggml-common.h
CODEBOOK = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)


def _blocks(codes: np.ndarray, d: np.ndarray, offset: np.ndarray | None) -> Blocks:
    """Return blocks whose minimum is -offset, or 0 if there is none."""
    ones = np.ones((len(codes), 1), np.int16)
    if offset is None:
        return Blocks(codes, ones, np.zeros_like(ones), d, np.zeros_like(d))
    return Blocks(codes, ones, ones, d, -offset)


def _unpack(data: np.ndarray, has_offset: bool, has_fifth_bits: bool) -> Blocks:
    """Read d, then the offset, then the fifth bits, then the nibbles.

    The second half of the weights is in the upper nibbles.
    """
    d = as_float16(data[:, :2])
    rest = data[:, 2:]
    offset = None
    if has_offset:
        offset = as_float16(rest[:, :2])
        rest = rest[:, 2:]
    fifth = None
    if has_fifth_bits:
        fifth = rest[:, :4]
        rest = rest[:, 4:]
    codes = unpack_fields(rest, 1, 2, 4).reshape(-1, 32)
    if fifth is not None:
        codes = codes | (unpack_fields(fifth, 4, 8, 1).reshape(-1, 32) << np.uint8(4))
    return _blocks(codes, d, offset)


def _pack(blocks: Blocks, has_offset: bool, has_fifth_bits: bool) -> np.ndarray:
    codes = blocks.codes
    parts = [as_bytes(blocks.d)]
    if has_offset:
        parts.append(as_bytes(-blocks.dmin))
    if has_fifth_bits:
        parts.append(pack_fields((codes >> 4).reshape(-1, 4, 8, 1), 1))
    parts.append(pack_fields((codes & 15).reshape(-1, 1, 2, 16), 4))
    return np.concatenate(parts, 1)


def _unpack_q8_0(data: np.ndarray) -> Blocks:
    """Read d, then signed bytes; a code is the byte with its sign flipped."""
    return _blocks(data[:, 2:] ^ np.uint8(128), as_float16(data[:, :2]), None)


def _pack_q8_0(blocks: Blocks) -> np.ndarray:
    return np.concatenate([as_bytes(blocks.d), blocks.codes ^ np.uint8(128)], 1)


def _nibble_type(
    name: str, levels: np.ndarray, has_offset: bool, has_fifth_bits: bool
) -> BlockType:
    """Describe a type whose codes are nibbles, some with a fifth bit."""
    return BlockType(
        name,
        sub_block_size=32,
        levels=levels,
        scale_range=None,
        largest_minimum=0 if has_offset else None,
        unpack=partial(_unpack, has_offset=has_offset, has_fifth_bits=has_fifth_bits),
        pack=partial(_pack, has_offset=has_offset, has_fifth_bits=has_fifth_bits),
    )


TYPES_OF_32 = (
    _nibble_type("Q4_0", np.arange(-8, 8, dtype=np.float32), False, False),
    _nibble_type("Q4_1", np.arange(16, dtype=np.float32), True, False),
    _nibble_type("Q5_0", np.arange(-16, 16, dtype=np.float32), False, True),
    _nibble_type("Q5_1", np.arange(32, dtype=np.float32), True, True),
    _nibble_type("IQ4_NL", CODEBOOK, False, False),
    BlockType(
        "Q8_0",
        sub_block_size=32,
        levels=np.arange(-128, 128, dtype=np.float32),
        scale_range=None,
        largest_minimum=None,
        unpack=_unpack_q8_0,
        pack=_pack_q8_0,
        lowest_code=1,  # -128 could be stored, but ggml never does, and kernels count on it
    ),
)
