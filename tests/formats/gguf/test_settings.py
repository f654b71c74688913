"""Settings that llama.cpp computes as the model does, or a refusal by name."""

import json

import pytest

from quantline.errors import Failure, StageError
from quantline.formats.gguf.architectures import gguf_family
from quantline.formats.gguf.settings import context_length, limits, window_pattern
from quantline.model.checkpoint import Checkpoint
from tests.helpers.gguf import write_unquantized
from tests.helpers.tensor_files import edit_json
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
WINDOWED = "sliding_attention"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
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
    "Llama 3's scaling elsewhere": (
        "qwen3",
        {"rope_parameters": LLAMA3},
        "among default, linear, yarn as llama.cpp's qwen3 has it, found 'llama3'",
    ),
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
        "rope_parameters.*must have length 32, got 1",
    ),
    "a scaling without its factor": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        "rope_parameters in config.json, found .*Missing required keys.*factor",
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
    for kinds, length in ((["full_attention"] * 2, 256), (["full_attention", WINDOWED], 64)):
        assert context_length(family, arch, {"sliding_window": 64, "layer_types": kinds}) == length


UNTIED = {"tie_word_embeddings": False, "query_pre_attn_scalar": 16}
# A shape that llama.cpp cannot hold → the family, its sizes, and words of the error.
SHAPES = {
    "qwen3 with biases": (
        "qwen3",
        {"attention_bias": True},
        "without biases, found model.layers.0",
    ),
    "qwen3_moe with biases": (
        "qwen3_moe",
        FEW_EXPERTS | {"attention_bias": True, "norm_topk_prob": True},
        "without biases, found",
    ),
    "gemma2 with biases": ("gemma2", GEMMA | {"attention_bias": True}, "without biases, found"),
    "gemma3 with biases": ("gemma3_text", GEMMA | {"attention_bias": True}, "without biases"),
    "starcoder2 without biases": ("starcoder2", {"use_bias": False}, "found no model.layers.0"),
    "gpt_neox without biases": ("gpt_neox", {"attention_bias": False}, "found no gpt_neox.layers"),
    "gpt_neox tied": ("gpt_neox", {"tie_word_embeddings": True}, "a head of its own"),
    "phi tied": ("phi", {"tie_word_embeddings": True}, "a head of its own"),
    "gemma2 untied": ("gemma2", GEMMA | UNTIED, "lm_head.weight"),
    "qwen2 with wide heads": ("qwen2", {"hidden_size": 48}, "heads that fill the hidden size"),
    "llama rotated in part": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_write_refuses_shapes_that_llama_cpp_cannot_hold(name, tmp_path, make_model):
    family, sizes, words = SHAPES[name]
    small = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}
    rotation = {key: value for key, value in sizes.items() if key == "rope_parameters"}
    built = {key: value for key, value in sizes.items() if key not in rotation}
    source = make_model(tmp_path / "model", family, **small | built)
    # Afterwards, for what some packages make of transformers cannot build such a model.
    edit_json(source / "config.json", **rotation)
    if name == "qwen2 with wide heads":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"head_dim": 32}))
    with pytest.raises(StageError, match=words) as caught:
        write_unquantized(tmp_path, source, "float32")
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
    assert not (tmp_path / "bundle").exists() or not list((tmp_path / "bundle").iterdir())


def test_limits_say_that_the_window_is_missing(tmp_path, make_model):
    small = {"hidden_size": 64, "intermediate_size": 96}
    windowed = Checkpoint(make_model(tmp_path / "a", "mistral", sliding_window=16, **small))
    assert "a context of 16 tokens, the window, instead of 256" in limits(windowed)[0]
    assert limits(Checkpoint(make_model(tmp_path / "b", "llama", **small))) == []
