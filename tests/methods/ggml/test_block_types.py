"""The codec of ggml's blocks: bit for bit against the gguf package, and there and back again."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st

from quantline.methods.ggml.block_types import (
    BLOCK_TYPES,
    block_type,
    dequantize_blocks,
    plain_grid_of,
)
from quantline.methods.ggml.blocks import Blocks
from quantline.methods.ggml.quantize import quantize_blocks
from tests.helpers.ggml_layers import TYPES


def quantized(ggml_type: str, seed: int, spread: float = 1.0) -> np.ndarray:
    """Return ggml's blocks [n, bytes] of rows with groups of zeros, of one sign, of any size."""
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(6, 512))
    weight *= np.exp(spread * generator.normal(size=(6, 16))).repeat(32, 1)
    weight[0, :40] = 0
    weight[1, 256:] = np.abs(weight[1, 256:])
    weight[2] = -np.abs(weight[2])
    importance = np.exp(generator.normal(size=512))
    data = quantize_blocks(weight.astype(np.float32), ggml_type, importance)
    return data.reshape(-1, block_type(ggml_type).block_bytes)


def test_block_types_are_all_that_the_codec_knows():
    assert set(TYPES) == {
        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
        "Q8_0",
    }  # fmt: skip
    assert all(name == known.name for name, known in BLOCK_TYPES.items())
    with pytest.raises(KeyError):
        block_type("F16")


@given(st.integers(0, 2**32 - 1), st.sampled_from(TYPES), st.sampled_from([0.1, 1.0, 4.0]))
def test_pack_gives_ggmls_blocks_back_bit_for_bit(seed, ggml_type, spread):
    data = quantized(ggml_type, seed, spread)
    known = block_type(ggml_type)
    assert np.array_equal(known.pack(known.unpack(data)), data)


@given(st.integers(0, 2**32 - 1), st.sampled_from(TYPES))
def test_pack_gives_any_bytes_back_bit_for_bit(seed, ggml_type):
    known = block_type(ggml_type)
    data = np.random.default_rng(seed).integers(0, 256, (8, known.block_bytes), np.uint8)
    assert np.array_equal(known.pack(known.unpack(data)), data)


@given(st.integers(0, 2**32 - 1), st.sampled_from(TYPES))
def test_dequantize_gives_the_weights_of_the_gguf_package(seed, ggml_type):
    data = quantized(ggml_type, seed)
    known = block_type(ggml_type)
    expected = quants.dequantize(data, GGMLQuantizationType[ggml_type])
    weights = known.dequantize(known.unpack(data))
    assert np.array_equal(weights.view(np.uint32), expected.view(np.uint32))


@given(st.integers(0, 2**32 - 1), st.sampled_from(TYPES))
def test_pack_stores_any_fields_in_their_ranges(seed, ggml_type):
    known = block_type(ggml_type)
    generator = np.random.default_rng(seed)
    shape = (5, known.block_size // known.sub_block_size)
    least, most = known.scale_range or (1, 1)
    scales = generator.integers(least, most, shape, np.int16, endpoint=True)
    has_minimum = known.largest_minimum is not None
    minima = np.full(shape, 1 if has_minimum else 0, np.int16)
    if known.largest_minimum:
        minima = generator.integers(0, known.largest_minimum, shape, np.int16, endpoint=True)
    d = generator.normal(size=(5, 1)).astype(np.float16)
    dmin = generator.normal(size=(5, 1)).astype(np.float16)
    codes = generator.integers(
        known.lowest_code, len(known.levels), (5, known.block_size), np.uint8
    )
    blocks = Blocks(codes, scales, minima, d, dmin if has_minimum else np.zeros_like(dmin))
    packed = known.pack(blocks)
    unpacked = known.unpack(packed)
    for field, expected in zip(unpacked.fields(), blocks.fields(), strict=True):
        assert np.array_equal(field, expected)
    expected = quants.dequantize(packed, GGMLQuantizationType[ggml_type])
    assert np.array_equal(known.dequantize(blocks), expected)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_block_type_has_ggmls_sizes(ggml_type):
    known = block_type(ggml_type)
    assert known.block_size % known.sub_block_size == 0
    assert len(known.levels) <= 256
    assert (np.diff(known.levels) > 0).all()
    assert known.is_uniform == (not ggml_type.startswith("IQ4"))
    assert quantized(ggml_type, 0).shape[1] == known.block_bytes


@pytest.mark.parametrize("ggml_type", ["Q4_K", "IQ4_XS", "Q8_0", "IQ3_XXS", "F16", "F32"])
def test_dequantize_blocks_knows_types_with_and_without_a_codec(ggml_type):
    weight = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    data = quantize_blocks(weight, ggml_type)
    weights = dequantize_blocks(data, ggml_type)
    assert weights.shape == weight.shape
    expected = quants.dequantize(data, GGMLQuantizationType[ggml_type]).astype(np.float32)
    assert np.array_equal(weights, expected)


def test_plain_grid_of_a_type_is_what_it_refines():
    grids = {
        "Q2_K": (2, 16, False),
        "Q3_K": (3, 16, True),
        "Q4_K": (4, 32, False),
        "Q6_K": (6, 16, True),
        "Q8_0": (8, 32, True),
        "Q4_0": (4, 32, True),
        "Q5_1": (5, 32, False),
    }
    for ggml_type, grid in grids.items():
        assert plain_grid_of(ggml_type) == grid
    for ggml_type in ("IQ4_NL", "IQ4_XS", "IQ3_XXS", "F16"):
        assert plain_grid_of(ggml_type) is None
