"""Moving the scales of ggml's blocks down tr(G Δ H Δᵀ)."""

import numpy as np
import pytest

from quantline.methods.ggml.block_types import block_type
from quantline.methods.ggml.blocks import Blocks
from quantline.methods.ggml.quantize import quantize_blocks
from quantline.methods.ggml.scale_refit import refit_scales
from tests.helpers.ggml_layers import divergence_of_blocks, random_torch_layer


@pytest.mark.parametrize("ggml_type", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS"])
def test_refit_scales_starts_sub_blocks_from_where_the_moves_before_ended(ggml_type):
    """With d far off, only then does one pass gain nearly as much as ten."""
    known = block_type(ggml_type)
    weight, hessian, fisher_out = random_torch_layer(7, 4, 512)
    data = quantize_blocks(weight.numpy(), ggml_type).reshape(-1, known.block_bytes)
    codes, scales, minima, d, dmin = known.unpack(data).fields()
    before = Blocks(codes, scales, minima, d * np.float16(1.3), dmin)
    after_one = refit_scales(weight, known, before, hessian, fisher_out)
    after_ten = after_one
    for _ in range(9):
        after_ten = refit_scales(weight, known, after_ten, hessian, fisher_out)
    values = []
    for blocks in (before, after_one, after_ten):
        values.append(divergence_of_blocks(blocks, known, weight, hessian, fisher_out))
    assert values[1] - values[2] < 0.1 * (values[0] - values[2])


@pytest.mark.parametrize("ggml_type", ["Q4_K", "Q5_1", "IQ4_NL"])
def test_refit_scales_leaves_the_codes_and_what_it_was_given(ggml_type):
    known = block_type(ggml_type)
    weight, hessian, fisher_out = random_torch_layer(8, 4, 512)
    data = quantize_blocks(weight.numpy(), ggml_type).reshape(-1, known.block_bytes)
    before = known.unpack(data)
    after = refit_scales(weight, known, before, hessian, fisher_out)
    assert np.array_equal(after.codes, before.codes)
    assert np.array_equal(known.pack(before), data)
    assert not np.array_equal(known.pack(after), data)
    for field, old in zip(after.fields(), before.fields(), strict=True):
        assert (field.dtype, field.shape) == (old.dtype, old.shape)
