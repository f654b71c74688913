"""transformers' conversions while a bundle with quantized layers is loaded."""

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming

from quantline.model.configuration import read_config
from quantline.model.join_experts import experts_joined
from quantline.model.meta_model import meta_model
from tests.helpers.tensor_files import write_tensors

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "moe_intermediate_size": 32}
LAYER = "model.layers.1.mlp.experts.0.down_proj"
QUANTIZED = {f"{LAYER}.weight_packed": np.int32, f"{LAYER}.weight_scale": np.float32}


def names_of(folder):
    """Return the patterns of all conversions that transformers applies."""
    entries = get_model_conversion_mapping(meta_model(read_config(folder)), add_legacy=False)
    return [(type(entry), *entry.source_patterns) for entry in entries]


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [
        ("axk1", "AXK1ForCausalLM"),
        ("deepseek_v3", "DeepseekV3ForCausalLM"),
        ("gpt_oss", "GptOssForCausalLM"),
        ("qwen3_moe", "Qwen3MoeForCausalLM"),
    ],
)
def test_each_conversion_is_applied_once_and_taken_back(model_type, class_name, tmp_path):
    """A name that is renamed twice is one that no model has."""
    config = AutoConfig.for_model(model_type, architectures=[class_name], **SIZES)
    config.save_pretrained(tmp_path)
    tensors = {name: np.zeros((1, 1), dtype) for name, dtype in QUANTIZED.items()}
    write_tensors(tmp_path / "model.safetensors", tensors)
    before = names_of(tmp_path)
    kept = get_checkpoint_conversion_mapping(model_type)
    with experts_joined(tmp_path):
        joined = names_of(tmp_path)
    assert names_of(tmp_path) == before
    assert len(set(joined)) == len(joined) >= 2  # what joins gate and up, and down
    renamed = [entry for entry in joined if entry[0] is WeightRenaming]
    assert renamed == [entry for entry in before if entry[0] is WeightRenaming]
    assert (get_checkpoint_conversion_mapping(model_type) is None) == (kept is None)


def test_layers_join_where_the_conversion_of_the_published_form_has_no_tensors(tmp_path):
    """Step 3.7's experts are published stacked: a bundle's, which lie apart, are none of those."""
    class_name = "Step3p7ForConditionalGeneration"
    layers = ["dense"] * 3 + ["sparse"]
    sizes = SIZES | {"num_hidden_layers": 4, "n_routed_experts": 2, "mlp_layer_types": layers}
    sizes |= {"layer_types": ["full_attention"] * 4, "share_expert_dim": 32, "head_dim": 16}
    text = {"model_type": "step3p5", **sizes}
    config = AutoConfig.for_model("step3p7", architectures=[class_name], text_config=text)
    config.save_pretrained(tmp_path)
    apart = [f"model.language_model.layers.3.mlp.experts.0.{part}_proj" for part in ("gate", "up")]
    tensors = {f"{layer}.weight_scale": np.zeros((1, 1), np.float32) for layer in apart}
    write_tensors(tmp_path / "model.safetensors", tensors)
    sources = ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight")
    assert not any(entry[1:] == sources for entry in names_of(tmp_path))
    with experts_joined(tmp_path):
        assert any(entry[1:] == sources for entry in names_of(tmp_path))
