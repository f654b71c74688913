"""The AWQ layout: packing against plain arithmetic on words."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quantline.formats.safetensors.layouts.awq import pack, unpack
from tests.helpers.layouts import random_integers


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3))
def test_pack_holds_eight_outputs_a_word_in_its_order(seed, rows, blocks):
    numbers = random_integers(seed, rows, 8 * blocks, 4)
    words = pack(numbers)
    assert words.dtype == np.int32
    assert words.shape == (rows, blocks)
    for row in range(rows):
        for block in range(blocks):
            eight = numbers[row, 8 * block : 8 * block + 8]
            expected = 0
            for position, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                expected += int(eight[output]) << 4 * position
            assert int(words[row, block].view(np.uint32)) == expected
    assert np.array_equal(unpack(words), numbers)
