"""Every family in ONNX."""

import numpy as np
import pytest

from quantline.formats.container import load_container
from quantline.runtimes.runtime import open_runtime
from tests.helpers.families import GPTQ_CURVATURE
from tests.helpers.quantized import (
    differing,
    tokens_of,
    torch_greedy,
    torch_logprobs,
    torch_model,
)

CONTAINER = load_container("onnx")


@pytest.mark.parametrize(
    "recipe", [None, pytest.param(GPTQ_CURVATURE, marks=pytest.mark.slow)], ids=["float32", "int4"]
)
def test_onnx_write_agrees_with_torch(family, recipe):
    checkpoint = family.checkpoint
    quantized = family.quantized(recipe) if recipe else family.unquantized
    bundle = family.bundle("onnx", quantized)
    assert differing(CONTAINER, bundle, checkpoint, quantized) == []
    tokens = tokens_of(checkpoint, 2, 40)
    runtime = open_runtime("onnxruntime", bundle, 1)
    model = torch_model(checkpoint, quantized)
    assert np.abs(runtime.logprobs(tokens) - torch_logprobs(model, tokens)).max() < 1e-3
    assert runtime.generate(tokens[0].tolist(), 8, set()) == torch_greedy(model, tokens[:1], 8)
