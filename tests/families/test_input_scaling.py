"""Every family goes through the methods that scale inputs."""

import numpy as np
import pytest

from tests.helpers.families import GRID
from tests.helpers.quantized import torch_logprobs, torch_model

AWQ = GRID | {"method": "awq"}
EIGHT_BITS = {
    "awq": AWQ | {"bits": 8},
    "awq with gptq and curvature": AWQ | {"bits": 8, "rounding": "gptq", "curvature": True},
    "smoothquant": {"method": "smoothquant"},
}
SLOW = ("awq with gptq and curvature", "smoothquant")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in EIGHT_BITS]
)
def test_quantize_model_at_eight_bits_nearly_keeps_the_function(family, name):
    quantized = family.quantized(EIGHT_BITS[name])
    assert quantized.linears == sorted(family.arch.linears())
    found = torch_logprobs(torch_model(family.checkpoint, quantized), family.tokens)
    assert 0 < np.abs(found - family.logprobs).mean() < 0.02


def test_quantize_model_with_awq_folds_scales_into_weights_and_biases(family):
    checkpoint = family.checkpoint
    quantized = family.quantized(AWQ | {"bits": 4})
    offset = family.arch.family.norm_offset
    ratios = {}
    for name in quantized.overrides:
        ratios[name] = (quantized.override(name) + offset) / (checkpoint.tensor(name) + offset)
    assert max(np.abs(ratio - 1).max() for ratio in ratios.values()) > 0.05
    for name, ratio in ratios.items():
        weight = f"{name.removesuffix('.bias')}.weight"
        if name.endswith(".bias") and weight in ratios:
            assert np.allclose(ratio, ratios[weight], rtol=1e-5)
    for name in checkpoint.names:
        if name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" in ratios:
            assert name in ratios
