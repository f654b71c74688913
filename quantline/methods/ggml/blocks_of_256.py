"""ggml's types of 256 weights in sub-blocks with integer scales.

Q2_K, Q3_K, Q4_K, Q5_K, Q6_K and IQ4_XS.
"""

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
from quantline.methods.ggml.blocks_of_32 import CODEBOOK

SIZE = 256  # weights in a block


def _without_minima(codes: np.ndarray, scales: np.ndarray, d: np.ndarray) -> Blocks:
    """Return the blocks of a type without minima."""
    minima = np.zeros_like(scales, np.int16)
    return Blocks(codes, scales.astype(np.int16), minima, d, np.zeros_like(d))


def _unpack_q2_k(data: np.ndarray) -> Blocks:
    """Read scales and minima of four bits each, then the codes, d and dmin."""
    fields = unpack_fields(data[:, :16], 1, 2, 4).astype(np.int16)[:, 0]
    codes = unpack_fields(data[:, 16:80], 2, 4, 2).reshape(-1, SIZE)
    d = as_float16(data[:, 80:82])
    dmin = as_float16(data[:, 82:])
    return Blocks(codes, fields[:, 0], fields[:, 1], d, dmin)


def _pack_q2_k(blocks: Blocks) -> np.ndarray:
    fields = np.stack([blocks.scales, blocks.minima], 1)
    parts = [
        pack_fields(fields[:, None], 4),
        pack_fields(blocks.codes.reshape(-1, 2, 4, 32), 2),
        as_bytes(blocks.d),
        as_bytes(blocks.dmin),
    ]
    return np.concatenate(parts, 1)


def _unpack_q3_k(data: np.ndarray) -> Blocks:
    """Read the codes' third bits, their lower two, scales of four plus two bits, and d."""
    third = unpack_fields(data[:, :32], 1, 8, 1).reshape(-1, SIZE)
    lower = unpack_fields(data[:, 32:96], 2, 4, 2).reshape(-1, SIZE)
    codes = lower | (third << np.uint8(2))
    lower_scales = unpack_fields(data[:, 96:104], 1, 2, 4).reshape(-1, 16)
    upper_scales = unpack_fields(data[:, 104:108], 1, 4, 2).reshape(-1, 16)
    scales = lower_scales | (upper_scales << np.uint8(4))
    return _without_minima(codes, scales.astype(np.int16) - 32, as_float16(data[:, 108:]))


def _pack_q3_k(blocks: Blocks) -> np.ndarray:
    codes = blocks.codes
    scales = (blocks.scales + 32).astype(np.uint8)
    parts = [
        pack_fields((codes >> 2).reshape(-1, 1, 8, 32), 1),
        pack_fields((codes & 3).reshape(-1, 2, 4, 32), 2),
        pack_fields((scales & 15).reshape(-1, 1, 2, 8), 4),
        pack_fields((scales >> 4).reshape(-1, 1, 4, 4), 2),
        as_bytes(blocks.d),
    ]
    return np.concatenate(parts, 1)


def _unpack_six_bits(fields: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read eight scales and eight minima of six bits from twelve bytes.

    The last four of each are split over two bytes: the lower four bits of both share a byte, and
    the upper two lie above one of the first four.
    """
    shared = fields[:, 8:]

    def join(first: np.ndarray, lower: np.ndarray) -> np.ndarray:
        last = lower | ((first >> 6) << 4)
        return np.concatenate([first & 63, last], 1).astype(np.int16)

    return join(fields[:, :4], shared & 15), join(fields[:, 4:8], shared >> 4)


def _pack_six_bits(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Write what `_unpack_six_bits` reads."""
    scales = scales.astype(np.uint8)
    minima = minima.astype(np.uint8)
    parts = [
        scales[:, :4] | ((scales[:, 4:] >> 4) << 6),
        minima[:, :4] | ((minima[:, 4:] >> 4) << 6),
        (scales[:, 4:] & 15) | (minima[:, 4:] << 4),
    ]
    return np.concatenate(parts, 1)


def _unpack_q4_k_or_q5_k(data: np.ndarray, has_fifth_bits: bool) -> Blocks:
    """Read d, dmin, scales and minima of six bits, the fifth bits, and the nibbles."""
    nibbles = data[:, 48:] if has_fifth_bits else data[:, 16:]
    codes = unpack_fields(nibbles, 4, 2, 4).reshape(-1, SIZE)
    if has_fifth_bits:
        fifth = unpack_fields(data[:, 16:48], 1, 8, 1).reshape(-1, SIZE)
        codes = codes | (fifth << np.uint8(4))
    scales, minima = _unpack_six_bits(data[:, 4:16])
    return Blocks(codes, scales, minima, as_float16(data[:, :2]), as_float16(data[:, 2:4]))


def _pack_q4_k_or_q5_k(blocks: Blocks, has_fifth_bits: bool) -> np.ndarray:
    codes = blocks.codes
    parts = [
        as_bytes(blocks.d),
        as_bytes(blocks.dmin),
        _pack_six_bits(blocks.scales, blocks.minima),
    ]
    if has_fifth_bits:
        parts.append(pack_fields((codes >> 4).reshape(-1, 1, 8, 32), 1))
    parts.append(pack_fields((codes & 15).reshape(-1, 4, 2, 32), 4))
    return np.concatenate(parts, 1)


def _unpack_q6_k(data: np.ndarray) -> Blocks:
    """Read the codes' lower nibbles, their upper two bits, the scales, and d.

    The lower nibbles of half a block's bytes hold its first two groups of 32, the upper ones the
    other two.
    """
    nibbles = unpack_fields(data[:, :128], 4, 2, 4).reshape(-1, 2, 2, 2, 32)
    lower = nibbles.swapaxes(2, 3).reshape(-1, SIZE)
    upper = unpack_fields(data[:, 128:192], 2, 4, 2).reshape(-1, SIZE)
    codes = lower | (upper << np.uint8(4))
    scales = np.ascontiguousarray(data[:, 192:208]).view(np.int8)
    return _without_minima(codes, scales, as_float16(data[:, 208:]))


def _pack_q6_k(blocks: Blocks) -> np.ndarray:
    lower = (blocks.codes & 15).reshape(-1, 2, 2, 2, 32).swapaxes(2, 3).reshape(-1, 4, 2, 32)
    parts = [
        pack_fields(lower, 4),
        pack_fields((blocks.codes >> 4).reshape(-1, 2, 4, 32), 2),
        blocks.scales.astype(np.int8).view(np.uint8),
        as_bytes(blocks.d),
    ]
    return np.concatenate(parts, 1)


def _unpack_iq4_xs(data: np.ndarray) -> Blocks:
    """Read d, the scales' upper two bits, their lower four, and the nibbles."""
    upper = unpack_fields(data[:, 2:4], 2, 4, 2).reshape(-1, 8)
    lower = unpack_fields(data[:, 4:8], 4, 2, 4).reshape(-1, 8)
    scales = (lower | (upper << np.uint8(4))).astype(np.int16) - 32
    codes = unpack_fields(data[:, 8:], 8, 2, 4).reshape(-1, SIZE)
    return _without_minima(codes, scales, as_float16(data[:, :2]))


def _pack_iq4_xs(blocks: Blocks) -> np.ndarray:
    scales = (blocks.scales + 32).astype(np.uint8)
    parts = [
        as_bytes(blocks.d),
        pack_fields((scales >> 4).reshape(-1, 2, 4, 1), 2),
        pack_fields((scales & 15).reshape(-1, 4, 2, 1), 4),
        pack_fields(blocks.codes.reshape(-1, 8, 2, 16), 4),
    ]
    return np.concatenate(parts, 1)


TYPES_OF_256 = (
    BlockType(
        "Q2_K",
        sub_block_size=16,
        levels=np.arange(4, dtype=np.float32),
        scale_range=(0, 15),
        largest_minimum=15,
        unpack=_unpack_q2_k,
        pack=_pack_q2_k,
    ),
    BlockType(
        "Q3_K",
        sub_block_size=16,
        levels=np.arange(-4, 4, dtype=np.float32),
        scale_range=(-32, 31),
        largest_minimum=None,
        unpack=_unpack_q3_k,
        pack=_pack_q3_k,
    ),
    BlockType(
        "Q4_K",
        sub_block_size=32,
        levels=np.arange(16, dtype=np.float32),
        scale_range=(0, 63),
        largest_minimum=63,
        unpack=partial(_unpack_q4_k_or_q5_k, has_fifth_bits=False),
        pack=partial(_pack_q4_k_or_q5_k, has_fifth_bits=False),
    ),
    BlockType(
        "Q5_K",
        sub_block_size=32,
        levels=np.arange(32, dtype=np.float32),
        scale_range=(0, 63),
        largest_minimum=63,
        unpack=partial(_unpack_q4_k_or_q5_k, has_fifth_bits=True),
        pack=partial(_pack_q4_k_or_q5_k, has_fifth_bits=True),
    ),
    BlockType(
        "Q6_K",
        sub_block_size=16,
        levels=np.arange(-32, 32, dtype=np.float32),
        scale_range=(-128, 127),
        largest_minimum=None,
        unpack=_unpack_q6_k,
        pack=_pack_q6_k,
    ),
    BlockType(
        "IQ4_XS",
        sub_block_size=32,
        levels=CODEBOOK,
        scale_range=(-32, 31),
        largest_minimum=None,
        unpack=_unpack_iq4_xs,
        pack=_pack_iq4_xs,
    ),
)
