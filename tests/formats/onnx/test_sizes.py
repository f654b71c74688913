"""The room that rounded weights take, against the tensors that are stored."""

import numpy as np
import pytest

from quantline.formats.onnx.quantized_nodes import gather_block_quantized, matmul_nbits
from quantline.formats.onnx.sizes import is_large, rounded_bytes
from tests.formats.onnx.test_quantized_nodes import random_layer


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("columns", "group_size"), [(256, 32), (192, 64), (384, 128), (90, -1)])
def test_rounded_bytes_are_those_of_the_nodes_tensors(bits, columns, group_size, symmetric):
    linear = random_layer(bits, columns if group_size == -1 else group_size, symmetric, columns)
    stored = matmul_nbits("x", linear, "x", "y").tensors.values()
    size = sum(tensor.nbytes for tensor in stored)
    assert rounded_bytes(linear.integers.shape, bits, group_size, symmetric) == size


@pytest.mark.parametrize("columns", [32, 64, 96, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_embedding_takes_what_a_head_that_is_the_same_takes(bits, columns):
    """Also where a group is a whole row, which has smaller blocks with eight bits."""
    group_size = 32 if columns == 96 else columns
    linear = random_layer(bits, group_size, True, columns)
    head = matmul_nbits("x", linear, "x", "y").tensors
    embedding = gather_block_quantized("x", linear, "ids", "y").tensors
    assert head.keys() < embedding.keys()
    assert all(np.array_equal(tensor, embedding[name]) for name, tensor in head.items())
    size = sum(tensor.nbytes for tensor in head.values())
    assert rounded_bytes(linear.integers.shape, bits, group_size, True) == size


def test_matrices_are_large_and_vectors_are_not():
    assert is_large((256, 256)) and is_large((1, 1 << 16))
    assert not is_large((255, 256)) and not is_large((1 << 20,)) and not is_large(())
