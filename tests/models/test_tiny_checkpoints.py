"""Tiny checkpoints: every name that transformers has, sizes by their names, weights that count."""

import pytest
import torch

from benchmarks.models.architectures import Architecture, architectures
from benchmarks.models.kinds import kind_of
from benchmarks.models.tiny_checkpoint import LARGEST, NotTinyError, write_checkpoint
from benchmarks.models.tiny_config import tiny_config

VOCABULARY = 1280


def test_architectures_are_those_of_transformers_own_mappings():
    from transformers.models.auto import modeling_auto

    found = architectures()
    of_text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    with_images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    assert {*of_text, *with_images} <= set(found)
    assert found["qwen3"].auto == "AutoModelForCausalLM"
    # It stands in both: its text is a part of its configuration.
    assert found["gemma3"].auto == "AutoModelForImageTextToText"


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("gpt2", {"n_embd": 256, "n_head": 4, "n_layer": 2}),
        ("deepseek_v3", {"kv_lora_rank": 64, "num_key_value_heads": 4, "n_routed_experts": 4}),
        ("qwen3_5_text", {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}),
        ("zamba", {"layers_block_type": ["linear_attention", "hybrid"] * 2}),
        (
            "gemma3n_text",
            {"intermediate_size": [512] * 4, "vocab_size_per_layer_input": VOCABULARY},
        ),
    ],
)
def test_tiny_config_finds_what_a_class_calls_its_sizes(model_type, sizes):
    config = tiny_config(model_type, VOCABULARY, None)
    assert {name: getattr(config, name) for name in sizes} == sizes


def test_tiny_config_makes_the_parts_of_a_wrapper_small():
    config = tiny_config("gemma3", VOCABULARY, None)
    assert config.text_config.hidden_size == 256
    assert config.vision_config.hidden_size == 64
    assert 0 < config.image_token_id < VOCABULARY


def test_write_checkpoint_draws_every_weight_and_always_the_same(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    written = []
    for name in ("first", "second"):
        made = write_checkpoint(Architecture("mixtral", "AutoModelForCausalLM"), tmp_path / name)
        written.append(load_file(tmp_path / name / "model.safetensors"))
    assert (made.class_name, made.kind) == ("MixtralForCausalLM", "mixture")
    assert made.parameters < LARGEST
    for name, first in written[0].items():
        assert torch.equal(first, written[1][name])
        assert len(first.unique()) > 1, name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert kind_of(model) == "mixture"


def test_write_checkpoint_refuses_what_looks_ahead(tmp_path):
    with pytest.raises(NotTinyError, match="depends on later ones"):
        write_checkpoint(Architecture("xlnet", "AutoModelForCausalLM"), tmp_path / "xlnet")


def test_kind_of_tells_hybrids_and_wrappers():
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    hybrid = AutoModelForCausalLM.from_config(tiny_config("qwen3_5_text", VOCABULARY, None))
    recurrent = AutoModelForCausalLM.from_config(tiny_config("mamba2", VOCABULARY, None))
    with torch.device("meta"):
        wrapper = AutoModelForImageTextToText.from_config(tiny_config("llava", VOCABULARY, None))
    assert kind_of(hybrid) == "hybrid dense"
    assert kind_of(recurrent) == "recurrent dense"
    assert kind_of(wrapper) == "dense wrapper"
