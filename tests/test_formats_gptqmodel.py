"""The GPTQ and AWQ layouts in the loader that they are made for; it is an extra: pip install 'quantline[gptqmodel]'."""

import numpy as np
import pytest
from rounded import rounded, tokens_of, torch_logprobs, torch_model

from quantline.model.checkpoint import Checkpoint
from quantline.config.params import Variant
from quantline.formats.safetensors import container as safetensors
from quantline.runtimes.runtime import open_runtime

pytest.importorskip("gptqmodel", reason="needs the extra gptqmodel")


@pytest.mark.parametrize(("layout", "bits", "symmetric"), [
    ("gptq", 4, False), ("gptq", 4, True), ("gptq", 8, False), ("gptq", 2, False), ("gptq", 3, False), ("awq", 4, False)])
def test_transformers_with_gptqmodel_computes_with_our_integers(tmp_path, tiny_model, layout, bits, symmetric):
    model = Checkpoint(tiny_model)
    quantized = rounded(tmp_path / "q", model, bits, 32, symmetric)
    (tmp_path / "out").mkdir()
    variant = Variant(recipe="rounded", format="safetensors", runtime="transformers", layout=layout)
    safetensors.write(model, quantized, tmp_path / "out", variant)
    tokens = tokens_of(model)
    found = open_runtime("transformers", tmp_path / "out", 1).logprobs(tokens)
    wanted = torch_logprobs(torch_model(model, quantized), tokens)
    assert np.abs(found - wanted).mean() < 0.02  # the kernels compute in half precision
