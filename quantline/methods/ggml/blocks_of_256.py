"""ggml's types of 256 weights in sub-blocks with integer scales: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS."""

import numpy as np

from quantline.methods.ggml.block_types import BlockType, Blocks, halves, join, split
from quantline.methods.ggml.blocks_of_32 import CODEBOOK


def _signed(codes: np.ndarray, scales: np.ndarray, d: np.ndarray) -> Blocks:
    """Blocks of a type without minima."""
    return Blocks(codes, scales.astype(np.int16), np.zeros_like(scales, np.int16), d, np.zeros_like(d))


def _bytes_of(*halved: np.ndarray) -> list[np.ndarray]:
    return [one.view(np.uint8) for one in halved]


def _unpack_q2(data: np.ndarray) -> Blocks:
    fields, quants, d, dmin = data[:, :16], data[:, 16:80], halves(data[:, 80:82]), halves(data[:, 82:])
    scales, minima = split(fields, 1, 2, 4).astype(np.int16)[:, 0].swapaxes(0, 1)
    return Blocks(split(quants, 2, 4, 2).reshape(-1, 256), scales, minima, d, dmin)


def _pack_q2(blocks: Blocks) -> np.ndarray:
    fields = join(np.stack([blocks.scales, blocks.minima], 1)[:, None], 4)
    return np.concatenate([fields, join(blocks.codes.reshape(-1, 2, 4, 32), 2), *_bytes_of(blocks.d, blocks.dmin)], 1)


def _unpack_q3(data: np.ndarray) -> Blocks:
    high, quants, fields, d = data[:, :32], data[:, 32:96], data[:, 96:108], halves(data[:, 108:])
    codes = split(quants, 2, 4, 2).reshape(-1, 256) | split(high, 1, 8, 1).reshape(-1, 256) << np.uint8(2)
    low, upper = split(fields[:, :8], 1, 2, 4).reshape(-1, 16), split(fields[:, 8:], 1, 4, 2).reshape(-1, 16)
    scales = low | upper << np.uint8(4)
    return _signed(codes, scales.astype(np.int16) - 32, d)


def _pack_q3(blocks: Blocks) -> np.ndarray:
    codes, scales = blocks.codes, (blocks.scales + 32).astype(np.uint8)
    return np.concatenate([join((codes >> 2).reshape(-1, 1, 8, 32), 1), join((codes & 3).reshape(-1, 2, 4, 32), 2),
                           join((scales & 15).reshape(-1, 1, 2, 8), 4), join((scales >> 4).reshape(-1, 1, 4, 4), 2),
                           *_bytes_of(blocks.d)], 1)


def _unpack_six_bits(fields: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of six bits in twelve bytes: the last four of each are split over two bytes."""
    scales, minima, lower = fields[:, :4], fields[:, 4:8], fields[:, 8:]
    return tuple(np.concatenate([first & 63, low | first >> 6 << 4], 1).astype(np.int16)
                 for first, low in ((scales, lower & 15), (minima, lower >> 4)))


def _pack_six_bits(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    scales, minima = scales.astype(np.uint8), minima.astype(np.uint8)
    firsts = [one[:, :4] | one[:, 4:] >> 4 << 6 for one in (scales, minima)]
    return np.concatenate([*firsts, scales[:, 4:] & 15 | minima[:, 4:] << 4], 1)


def _unpack_q45(data: np.ndarray, high: bool) -> Blocks:
    codes = split(data[:, 48 if high else 16:], 4, 2, 4).reshape(-1, 256)
    if high:
        codes = codes | split(data[:, 16:48], 1, 8, 1).reshape(-1, 256) << np.uint8(4)
    return Blocks(codes, *_unpack_six_bits(data[:, 4:16]), halves(data[:, :2]), halves(data[:, 2:4]))


def _pack_q45(blocks: Blocks, high: bool) -> np.ndarray:
    codes = blocks.codes
    fifth = [join((codes >> 4).reshape(-1, 1, 8, 32), 1)] if high else []
    return np.concatenate([*_bytes_of(blocks.d, blocks.dmin), _pack_six_bits(blocks.scales, blocks.minima), *fifth,
                           join((codes & 15).reshape(-1, 4, 2, 32), 4)], 1)


def _unpack_q6(data: np.ndarray) -> Blocks:
    """The lower nibbles of a half hold its first two groups of 32, the upper ones the other two."""
    low = split(data[:, :128], 4, 2, 4).reshape(-1, 2, 2, 2, 32).swapaxes(2, 3).reshape(-1, 256)
    codes = low | split(data[:, 128:192], 2, 4, 2).reshape(-1, 256) << np.uint8(4)
    return _signed(codes, np.ascontiguousarray(data[:, 192:208]).view(np.int8), halves(data[:, 208:]))


def _pack_q6(blocks: Blocks) -> np.ndarray:
    low = (blocks.codes & 15).reshape(-1, 2, 2, 2, 32).swapaxes(2, 3).reshape(-1, 4, 2, 32)
    return np.concatenate([join(low, 4), join((blocks.codes >> 4).reshape(-1, 2, 4, 32), 2),
                           blocks.scales.astype(np.int8).view(np.uint8), *_bytes_of(blocks.d)], 1)


def _unpack_iq4(data: np.ndarray) -> Blocks:
    low, high = split(data[:, 4:8], 4, 2, 4).reshape(-1, 8), split(data[:, 2:4], 2, 4, 2).reshape(-1, 8)
    return _signed(split(data[:, 8:], 8, 2, 4).reshape(-1, 256), (low | high << np.uint8(4)).astype(np.int16) - 32,
                   halves(data[:, :2]))


def _pack_iq4(blocks: Blocks) -> np.ndarray:
    scales = (blocks.scales + 32).astype(np.uint8)
    return np.concatenate([*_bytes_of(blocks.d), join((scales >> 4).reshape(-1, 2, 4, 1), 2),
                           join((scales & 15).reshape(-1, 4, 2, 1), 4), join(blocks.codes.reshape(-1, 8, 2, 16), 4)], 1)


TYPES = (
    BlockType("Q2_K", 16, np.arange(4, dtype=np.float32), (0, 15), 15, _unpack_q2, _pack_q2),
    BlockType("Q3_K", 16, np.arange(-4, 4, dtype=np.float32), (-32, 31), None, _unpack_q3, _pack_q3),
    BlockType("Q4_K", 32, np.arange(16, dtype=np.float32), (0, 63), 63, lambda data: _unpack_q45(data, False),
              lambda blocks: _pack_q45(blocks, False)),
    BlockType("Q5_K", 32, np.arange(32, dtype=np.float32), (0, 63), 63, lambda data: _unpack_q45(data, True),
              lambda blocks: _pack_q45(blocks, True)),
    BlockType("Q6_K", 16, np.arange(-32, 32, dtype=np.float32), (-128, 127), None, _unpack_q6, _pack_q6),
    BlockType("IQ4_XS", 32, CODEBOOK, (-32, 31), None, _unpack_iq4, _pack_iq4),
)
