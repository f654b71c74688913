"""The GPTQ and AWQ layouts in the loader that they are made for, which is an extra.

pip install 'quantline[gptqmodel]'
"""

import numpy as np
import pytest

from quantline.model.checkpoint import Checkpoint
from quantline.runtimes.runtime import open_runtime
from tests.helpers.quantized import rounded, tokens_of, torch_logprobs, torch_model
from tests.helpers.variants import write_variant

pytest.importorskip("gptqmodel", reason="needs the extra gptqmodel")


@pytest.mark.parametrize(
    ("layout", "bits", "symmetric"),
    [
        ("gptq", 4, False),
        ("gptq", 4, True),
        ("gptq", 8, False),
        ("gptq", 2, False),
        ("gptq", 3, False),
        ("awq", 4, False),
    ],
)
def test_write_is_loaded_by_transformers_with_gptqmodel(
    tmp_path, tiny_model, layout, bits, symmetric
):
    source = Checkpoint(tiny_model)
    quantized = rounded(tmp_path / "q", source, bits, 32, symmetric)
    write_variant("safetensors", tmp_path / "out", source, quantized, layout=layout)
    tokens = tokens_of(source)
    found = open_runtime("transformers", tmp_path / "out", 1).logprobs(tokens)
    expected = torch_logprobs(torch_model(source, quantized), tokens)
    assert np.abs(found - expected).mean() < 0.02  # the kernels compute in half precision
