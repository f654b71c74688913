"""Every family in GGUF, or a refusal by name."""

import numpy as np
import pytest

from quantline.errors import Failure, StageError
from quantline.formats.container import load_container
from quantline.runtimes.runtime import open_runtime
from tests.helpers.quantized import differing, tokens_of, torch_logprobs, torch_model
from tests.helpers.variants import write_variant


def test_gguf_write_agrees_with_torch(family, tmp_path):
    checkpoint = family.checkpoint
    if checkpoint.config["model_type"] == "qwen3_moe":
        words = "experts in all 2 blocks, found them in 1|norm_topk_prob True"
        with pytest.raises(StageError, match=words) as caught:
            write_variant("gguf", tmp_path / "out", checkpoint, family.unquantized)
        assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
        assert not list((tmp_path / "out").iterdir())
        return
    bundle = family.bundle("gguf", family.unquantized, dtype="float32")
    assert differing(load_container("gguf"), bundle, checkpoint, family.unquantized) == []
    tokens = tokens_of(checkpoint, 2, 40)
    found = open_runtime("llama.cpp", bundle, 1).logprobs(tokens)
    model = torch_model(checkpoint, family.unquantized)
    assert np.abs(found - torch_logprobs(model, tokens)).max() < 1e-3
