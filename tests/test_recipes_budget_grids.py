"""What a budget reckons of grouped integers, held against the tensors that are written."""

import numpy as np
import pytest
import torch

from quantline.formats.safetensors.layouts import compressed_tensors as compressed
from quantline.methods.integer import rtn
from quantline.recipes.budget.grids import packed_bytes


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 32), (3, 64), (4, 128), (8, -1)])
def test_the_size_of_a_layer_is_that_of_its_tensors(bits, group_size, symmetric):
    weight = torch.randn(36, 128, generator=torch.Generator().manual_seed(0))
    linear = rtn.quantize(weight, bits, 128 if group_size == -1 else group_size, symmetric)
    size = sum(one.nbytes for one in compressed.tensors("x", linear, np.float16).values())
    assert packed_bytes(weight.shape, bits, group_size, symmetric, 2) == size
