"""The factors of rotary frequencies in a GGUF file are those that transformers computes with."""

import json
import math

import numpy as np
import pytest

from quantline.formats.gguf.architectures import gguf_family
from quantline.formats.gguf.rope import rope_of
from quantline.model.configuration import complete, transformers_config
from quantline.model.read_architecture import architecture_from_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.5] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def written_and_wanted(model_type: str, rope: dict):
    """Return the rope of a file, and transformers' frequencies and attention factor."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = SIZES | {"model_type": model_type, "rope_parameters": rope}
    arch = architecture_from_config(json.loads(json.dumps(config)))
    written = rope_of(complete(config), arch, gguf_family(arch))
    wanted = ROPE_INIT_FUNCTIONS[rope["rope_type"]](transformers_config(config), "cpu")
    return written, wanted


@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (2.0, 3.0), (1.0, 1.0), (4.0, 1.0)])
def test_rope_of_llama3_divides_as_transformers_does(low, high):
    rope = LLAMA3 | {"low_freq_factor": low, "high_freq_factor": high}
    written, (frequencies, _) = written_and_wanted("llama", rope)
    plain = 1e4 ** (-np.arange(0, 16, 2) / 16)
    divided = plain / written.tensors["rope_freqs.weight"]
    np.testing.assert_allclose(divided, frequencies.numpy(), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"factor": 16.0}, {"factor": 0.5}])
def test_rope_of_longrope_scales_attention_as_transformers_does(options):
    written, (_, attention) = written_and_wanted("phi3", LONGROPE | options)
    assert math.isclose(written.settings["add_rope_scaling_attn_factors"], attention)
