"""Every family goes through every integer method."""

import numpy as np
import pytest

from tests.helpers.families import GRID, INT8
from tests.helpers.quantized import torch_logprobs, torch_model

EIGHT_BITS = [
    GRID | {"method": "rtn", "bits": 8},
    GRID | {"method": "gptq", "bits": 8},
    INT8,
    {"method": "fp8"},
]


@pytest.mark.parametrize("recipe", EIGHT_BITS, ids=lambda recipe: recipe["method"])
def test_quantize_model_at_eight_bits_nearly_keeps_the_function(family, recipe):
    quantized = family.quantized(recipe)
    assert quantized.linears == sorted(family.arch.linears())
    found = torch_logprobs(torch_model(family.checkpoint, quantized), family.tokens)
    error = np.abs(found - family.logprobs).mean()
    assert 0 < error < (0.1 if recipe["method"] == "fp8" else 0.02)
