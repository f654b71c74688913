"""GPTQ's error feedback within ggml's grids, against the paper's algorithm."""

import numpy as np
import torch

from quantline.methods.ggml.block_types import block_type
from quantline.methods.ggml.error_feedback import quantize_with_feedback, round_block_columns
from quantline.methods.ggml.quantize import quantize_blocks
from quantline.methods.integer.inverse_factor import inverse_factor
from tests.helpers.ggml_layers import random_torch_layer


def test_quantize_with_feedback_is_gptqs_algorithm_column_by_column():
    """In double, with the grids that ggml gives the updated weights."""
    q4_k = block_type("Q4_K")
    weight, hessian, _ = random_torch_layer(3)
    blocks, damping = quantize_with_feedback(weight, q4_k, hessian, 0.01)
    assert damping == 0.01
    factor, _ = inverse_factor(hessian, 0.01)
    upper = factor.double().numpy()
    remaining = weight.double().numpy().copy()
    codes = blocks.codes.reshape(weight.shape)
    for start in (0, 256):
        span = slice(start, start + 256)
        importance = np.diagonal(hessian)[span]
        data = quantize_blocks(remaining[:, span].astype(np.float32), "Q4_K", importance)
        scale, minimum = q4_k.unpack(data).grid
        scale = scale.repeat(32, 1)
        minimum = minimum.repeat(32, 1)
        for column in range(start, start + 256):
            s = scale[:, column - start]
            m = minimum[:, column - start]
            expected = np.clip(np.rint((remaining[:, column] + m) / s), 0, 15)
            assert (expected == codes[:, column]).mean() >= 7 / 8
            # Go on with our codes, so that ties do not spread.
            error = (remaining[:, column] - (s * codes[:, column] - m)) / upper[column, column]
            remaining[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])


def test_round_block_columns_keeps_a_code_without_a_scale_and_passes_its_error_on():
    q3_k = block_type("Q3_K")
    weight = np.zeros((1, 256), np.float32)
    blocks = q3_k.unpack(quantize_blocks(weight, "Q3_K").reshape(-1, q3_k.block_bytes))
    rounded, errors = round_block_columns(
        torch.from_numpy(weight + 1), q3_k, blocks, torch.eye(256)
    )
    assert np.array_equal(rounded.codes, blocks.codes)
    assert np.array_equal(errors, np.ones((1, 256)))
