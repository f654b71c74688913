"""The GPTQ layout: packing against plain arithmetic on words."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quantline.formats.safetensors.layouts.gptq import pack, unpack
from tests.helpers.layouts import random_integers


@given(
    st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 5)
)
def test_pack_is_a_stream_of_bits_down_the_inputs(seed, bits, blocks, columns):
    numbers = random_integers(seed, 32 * blocks, columns, bits)
    words = pack(numbers, bits)
    assert words.dtype == np.int32
    assert words.shape == (bits * blocks, columns)
    for column in range(columns):
        stream = 0
        for position, number in enumerate(numbers[:, column]):
            stream += int(number) << (bits * position)
        expected = [(stream >> 32 * word) & 0xFFFFFFFF for word in range(bits * blocks)]
        assert words[:, column].view(np.uint32).tolist() == expected
    assert np.array_equal(unpack(words, bits), numbers)
