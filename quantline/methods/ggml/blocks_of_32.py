"""ggml's types of 32 weights with one scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL."""

import numpy as np

from quantline.methods.ggml.block_types import BlockType, Blocks, halves, join, split

# kvalues_iq4nl of ggml-common.h
CODEBOOK = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _blocks(codes: np.ndarray, d: np.ndarray, m: np.ndarray | None) -> Blocks:
    """Blocks whose minimum is -m, or 0 if there is none."""
    ones = np.ones((len(codes), 1), np.int16)
    return Blocks(codes, ones, ones if m is not None else ones * np.int16(0), d,
                  -m if m is not None else np.zeros_like(d))


def _unpack(data: np.ndarray, minimum: bool, high: bool) -> Blocks:
    """d, then m, then the fifth bits, then the nibbles; the second half of the weights is in the upper nibbles."""
    d, rest = halves(data[:, :2]), data[:, 2:]
    m, rest = (halves(rest[:, :2]), rest[:, 2:]) if minimum else (None, rest)
    fifth, rest = (rest[:, :4], rest[:, 4:]) if high else (None, rest)
    codes = split(rest, 1, 2, 4).reshape(-1, 32)
    if high:
        codes = codes | split(fifth, 4, 8, 1).reshape(-1, 32) << np.uint8(4)
    return _blocks(codes, d, m)


def _pack(blocks: Blocks, minimum: bool, high: bool) -> np.ndarray:
    codes = blocks.codes
    parts = [blocks.d.view(np.uint8)]
    if minimum:
        parts.append((-blocks.dmin).view(np.uint8))
    if high:
        parts.append(join((codes >> 4).reshape(-1, 4, 8, 1), 1))
    return np.concatenate([*parts, join((codes & 15).reshape(-1, 1, 2, 16), 4)], 1)


def _unpack_bytes(data: np.ndarray) -> Blocks:
    return _blocks(data[:, 2:] ^ np.uint8(128), halves(data[:, :2]), None)


def _pack_bytes(blocks: Blocks) -> np.ndarray:
    return np.concatenate([blocks.d.view(np.uint8), blocks.codes ^ np.uint8(128)], 1)


def _type(name: str, levels: np.ndarray, minimum: bool, high: bool) -> BlockType:
    return BlockType(name, 32, levels, None, 0 if minimum else None, lambda data: _unpack(data, minimum, high),
                     lambda blocks: _pack(blocks, minimum, high))


TYPES = (
    _type("Q4_0", np.arange(-8, 8, dtype=np.float32), False, False),
    _type("Q4_1", np.arange(16, dtype=np.float32), True, False),
    _type("Q5_0", np.arange(-16, 16, dtype=np.float32), False, True),
    _type("Q5_1", np.arange(32, dtype=np.float32), True, True),
    _type("IQ4_NL", CODEBOOK, False, False),
    # -128 could be stored, but ggml never does, and kernels count on it
    BlockType("Q8_0", 32, np.arange(-128, 128, dtype=np.float32), None, None, _unpack_bytes, _pack_bytes, lowest=1),
)
