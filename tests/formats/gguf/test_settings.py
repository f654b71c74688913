"""Settings that llama.cpp computes as the model does, or a refusal by name."""

import json

import pytest

from quantline.errors import Failure, StageError
from quantline.formats.gguf.architectures import gguf_family
from quantline.formats.gguf.settings import context_length, window_pattern
from quantline.model.checkpoint import Checkpoint
from tests.helpers.gguf import write_unquantized
from tests.helpers.variants import GEMMA

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(32)],
    "long_factor": [2.0 + i / 4 for i in range(32)],
    "rope_theta": 10000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 16.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
}
FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# What is wrong → the family, what its config.json says, and words of the error.
REFUSED = {
    "dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "'dynamic'",
    ),
    "another yarn": ("qwen3", {"rope_parameters": YARN}, "beta_fast"),
    "longrope in a llama": ("llama", {"rope_parameters": LONGROPE}, "'longrope'"),
    "another scale of attention": (
        "gemma2",
        GEMMA | {"query_pre_attn_scalar": 99},
        "query_pre_attn_scalar 64",
    ),
    "no softcap in Gemma 2": (
        "gemma2",
        GEMMA | {"attn_logit_softcapping": None},
        "a number for attn_logit_softcapping",
    ),
    "weights of experts that do not add up to one": (
        "qwen3_moe",
        {"norm_topk_prob": False},
        "norm_topk_prob True",
    ),
    "another scale in each layer": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "inverse_layer_idx False, found True",
    ),
    "too few factors": (
        "phi3",
        {
            "rope_parameters": LONGROPE | {"long_factor": [1.0]},
            "original_max_position_embeddings": 64,
        },
        "expected 32 numbers for rope_factors_long.weight, found 1",
    ),
    "a scaling without its factor": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        "expected 'factor' for the rope scaling linear",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_write_refuses_what_llama_cpp_would_compute_otherwise(name, tmp_path, make_model):
    family, changes, words = REFUSED[name]
    sizes = FEW_EXPERTS if family == "qwen3_moe" else {}
    source = make_model(tmp_path / "model", family, **sizes)
    config = json.loads((source / "config.json").read_text())
    config |= {"rope_scaling": None} | changes
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match=words) as caught:
        write_unquantized(tmp_path, source, "float32")
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"]}, [True, False]),
        ({"sliding_window_pattern": 2}, [True, False, True]),
        ({}, [True, True, False]),
    ],
)
def test_window_pattern_follows_config_json_before_the_familys_period(config, pattern):
    assert window_pattern(config, len(pattern), period=3) == pattern


def test_context_length_ends_at_a_window_that_llama_cpp_ignores(tiny_model):
    arch = Checkpoint(tiny_model).arch
    family = gguf_family(arch)
    assert family.ignores_window
    assert context_length(family, arch, {"sliding_window": 64}) == 64
    ignored = {"sliding_window": 64, "use_sliding_window": False}
    assert context_length(family, arch, ignored) == arch.max_positions
    assert context_length(family, arch, {}) == arch.max_positions
