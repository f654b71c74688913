"""Scales are folded in models whose family has no table, by what load traced."""

import numpy as np
import pytest

from quantline.config.recipes import parse_recipe
from quantline.ingest.verify.blocks import check_blocks
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.store import QuantizedModel
from quantline.recipes.quantize import quantize_model
from tests.helpers.calibrated import calibrate_into
from tests.helpers.quantized import rounded, tokens_of, torch_logprobs, torch_model

AWQ = {"method": "awq", "bits": 8, "group_size": 32, "symmetric": False}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
# Model type → sizes, and what scales are folded into, with what norms add to their weights.
MODELS = {
    "nemotron": (
        {},
        {"input_layernorm": 1.0, "self_attn.v_proj": 0.0, "post_attention_layernorm": 1.0},
    ),
    "minicpm3": (
        LATENT,
        {
            "input_layernorm": 0.0,
            "self_attn.q_a_layernorm": 0.0,
            "self_attn.kv_a_layernorm": 0.0,
            "post_attention_layernorm": 0.0,
            "mlp.up_proj": 0.0,
        },
    ),
}


def checkpoint_of(folder, make_model, model_type, sizes) -> Checkpoint:
    model = make_model(
        folder,
        model_type,
        hidden_size=64,
        intermediate_size=96,
        num_key_value_heads=4,
        num_hidden_layers=1,
        tie_word_embeddings=False,
        **sizes,
    )
    return Checkpoint(model, structure=check_blocks(Checkpoint(model)))


@pytest.mark.parametrize(
    "model_type", ["nemotron", pytest.param("minicpm3", marks=pytest.mark.slow)]
)
def test_quantize_model_with_awq_folds_what_was_traced(model_type, make_model, tmp_path):
    sizes, expected = MODELS[model_type]
    checkpoint = checkpoint_of(tmp_path / "model", make_model, model_type, sizes)
    groups = checkpoint.arch.input_groups(0)
    found_before = {group.before: group.norm_offset for group in groups if group.before}
    assert found_before == {f"model.layers.0.{name}": offset for name, offset in expected.items()}
    tokens = tokens_of(checkpoint, 4, 40)
    calibration = calibrate_into(tmp_path / "calibration", checkpoint, tokens)
    unquantized = rounded(tmp_path / "unquantized", checkpoint, bits=0)
    logprobs = torch_logprobs(torch_model(checkpoint, unquantized), tokens)
    folder = tmp_path / "awq"
    folder.mkdir()
    report = quantize_model("r", parse_recipe(AWQ), checkpoint, calibration, folder)
    quantized = QuantizedModel(folder)
    changes = [
        np.abs(quantized.override(name) - checkpoint.tensor(name)).max()
        for name in quantized.overrides
    ]
    assert max(changes) > 0.05
    found = torch_logprobs(torch_model(checkpoint, quantized), tokens)
    assert 0 < np.abs(found - logprobs).mean() < 0.01
    folded = {step["into"] for step in report["transforms"] if step["step"] == "fold_scales"}
    assert folded <= {group.before for group in groups}
    for group in groups:
        for name in group.linears:
            assert report["layers"][name].get("unscaled", "") == group.reason
