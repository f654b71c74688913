"""The codec of ggml's blocks: bit for bit against the gguf package, and there and back again."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st

from quantline.methods.ggml import quantize as kquant
from quantline.methods.ggml.block_types import Blocks, block_type, join, split

TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def quantized(kind: str, seed: int, spread: float = 1.0) -> np.ndarray:
    """ggml's blocks [n, bytes] of rows with groups of zeros, of one sign and of very different sizes."""
    draw = np.random.default_rng(seed)
    weight = draw.normal(size=(6, 512)) * np.exp(spread * draw.normal(size=(6, 16))).repeat(32, 1)
    weight[0, :40], weight[1, 256:], weight[2] = 0, np.abs(weight[1, 256:]), -np.abs(weight[2])
    data = kquant.quantize(weight.astype(np.float32), kind, np.exp(draw.normal(size=512)))
    return data.reshape(-1, block_type(kind).bytes)


@given(st.integers(0, 2**32 - 1), st.sampled_from(TYPES), st.sampled_from([0.1, 1.0, 4.0]))
def test_ggmls_blocks_come_back_bit_for_bit(seed, kind, spread):
    data, one = quantized(kind, seed, spread), block_type(kind)
    assert np.array_equal(one.pack(one.unpack(data)), data)


@given(st.integers(0, 2**32 - 1), st.sampled_from(TYPES))
def test_any_bytes_come_back_bit_for_bit(seed, kind):
    one = block_type(kind)
    data = np.random.default_rng(seed).integers(0, 256, (8, one.bytes), np.uint8)
    assert np.array_equal(one.pack(one.unpack(data)), data)


@given(st.integers(0, 2**32 - 1), st.sampled_from(TYPES))
def test_the_weights_are_those_of_the_gguf_package(seed, kind):
    data, one = quantized(kind, seed), block_type(kind)
    theirs = quants.dequantize(data, GGMLQuantizationType[kind])
    assert np.array_equal(one.dequantize(one.unpack(data)).view(np.uint32), theirs.view(np.uint32))


@given(st.integers(0, 2**32 - 1), st.sampled_from(TYPES))
def test_any_fields_in_their_ranges_are_stored(seed, kind):
    one, draw = block_type(kind), np.random.default_rng(seed)
    subs = one.size // one.sub
    low, high = one.scales or (1, 1)
    minima = np.full((5, subs), 0 if one.minima is None else 1, np.int16)
    if one.minima:
        minima = draw.integers(0, one.minima, (5, subs), np.int16, True)
    halved = [draw.normal(size=(5, 1)).astype(np.float16) for _ in range(2)]
    blocks = Blocks(draw.integers(one.lowest, len(one.levels), (5, one.size), np.uint8),
                    draw.integers(low, high, (5, subs), np.int16, True), minima, halved[0],
                    halved[1] if one.minima is not None else np.zeros_like(halved[1]))
    back = one.unpack(one.pack(blocks))
    assert all(np.array_equal(*pair) for pair in zip(blocks.parts(), back.parts(), strict=True))
    theirs = quants.dequantize(one.pack(blocks), GGMLQuantizationType[kind])
    assert np.array_equal(one.dequantize(blocks), theirs)


@given(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 5), st.integers(0, 1000))
def test_split_undoes_join(bits, groups, width, seed):
    fields = np.random.default_rng(seed).integers(0, 1 << bits, (3, groups, 8 // bits, width), np.uint8)
    assert np.array_equal(split(join(fields, bits), groups, 8 // bits, bits), fields)


@pytest.mark.parametrize("kind", TYPES)
def test_the_sizes_are_ggmls(kind):
    one = block_type(kind)
    assert one.size % one.sub == 0 and len(one.levels) <= 256 and (np.diff(one.levels) > 0).all()
    assert one.uniform == (not kind.startswith("IQ4"))
    assert quantized(kind, 0).shape[1] == one.bytes
