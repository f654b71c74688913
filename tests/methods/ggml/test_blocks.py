"""Fields of ggml's blocks, in bytes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quantline.methods.ggml.blocks import as_bytes, as_float16, pack_fields, unpack_fields


@given(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 5), st.integers(0, 1000))
def test_unpack_fields_undoes_pack_fields(bits, groups, width, seed):
    generator = np.random.default_rng(seed)
    count = 8 // bits
    fields = generator.integers(0, 1 << bits, (3, groups, count, width), np.uint8)
    packed = pack_fields(fields, bits)
    assert packed.shape == (3, groups * width)
    assert np.array_equal(unpack_fields(packed, groups, count, bits), fields)


def test_pack_fields_puts_field_k_bits_times_k_up():
    fields = np.array([1, 2, 3, 0], np.uint8).reshape(1, 1, 4, 1)
    assert pack_fields(fields, 2).tolist() == [[0b00_11_10_01]]


def test_as_bytes_undoes_as_float16():
    data = np.arange(8, dtype=np.uint8).reshape(4, 2)
    values = as_float16(data)
    assert values.shape == (4, 1)
    assert values.dtype == np.float16
    assert np.array_equal(as_bytes(values), data)
