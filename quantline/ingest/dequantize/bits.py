"""Unpacking integers and 4-bit floats that share bytes."""

import numpy as np

# The values of the 4-bit float E2M1, by code (OCP Microscaling Formats 1.0, section 5.3.3).
E2M1 = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32
)
# The same of the 6-bit float E2M3 (section 5.3.2).
_E2M3_HALF = [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)]
E2M3 = np.array(_E2M3_HALF + [-value for value in _E2M3_HALF], dtype=np.float32)


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the first `count` values of a stream of bits along the last axis, lowest bit first.

    Args:
        words: Integers of any width [..., words].
        bits: Width of a value, 1 to 8.
        count: Values wanted.

    Returns:
        uint8 [..., count].
    """
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets[..., :count]
    if bits == 4:
        nibbles = np.empty((*octets.shape[:-1], 2 * octets.shape[-1]), np.uint8)
        nibbles[..., 0::2] = octets & 15
        nibbles[..., 1::2] = octets >> 4
        return nibbles[..., :count]
    stream = np.unpackbits(octets, axis=-1, bitorder="little", count=bits * count)
    stream = stream.reshape(*octets.shape[:-1], count, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]


def e2m1(octets: np.ndarray) -> np.ndarray:
    """Return the 4-bit floats of bytes [..., n], the low half of a byte first: [..., 2 n]."""
    octets = octets.view(np.uint8)
    return E2M1[unpack(octets, 4, 2 * octets.shape[-1])]


def powers_of_two(exponents: np.ndarray) -> np.ndarray:
    """Return the scales that E8M0 bytes stand for: 2 ** (byte - 127); 255 is not a number."""
    octets = exponents.view(np.uint8)
    scales = np.ldexp(np.float32(1), octets.astype(np.int32) - 127)
    return np.where(octets == 255, np.float32(np.nan), scales).astype(np.float32)
