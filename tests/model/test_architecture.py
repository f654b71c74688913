"""Sizes, names and parts of a model, read from its config.json."""

import json

import pytest

from quantline.errors import Failure, StageError
from quantline.model.checkpoint import Checkpoint
from quantline.model.family import FAMILIES, InputGroup
from quantline.model.read_architecture import architecture_from_config
from tests.helpers.families import SIZES


def test_architecture_of_a_tied_model_with_shared_keys(tiny_model):
    checkpoint = Checkpoint(tiny_model)
    arch = checkpoint.arch
    assert (arch.hidden_size, arch.layers, arch.head_dim) == (256, 2, 64)
    assert (arch.heads, arch.kv_heads) == (4, 2)
    assert arch.tied
    assert arch.head == arch.embedding == "model.embed_tokens.weight"
    linears = [name.removesuffix(".weight") for name in checkpoint.names if "_proj" in name]
    assert sorted(arch.linears()) == linears
    assert arch.linears()[0] == "model.layers.0.self_attn.q_proj"


def test_part_gives_llama_cpps_names(tiny_model):
    checkpoint = Checkpoint(tiny_model)
    arch = checkpoint.arch
    assert {arch.part(name) for name in checkpoint.names} == {
        "token_embd",
        "output_norm",
        "attn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_norm",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    }
    with pytest.raises(StageError, match=r"llama is known to have, found model\.vision\.weight"):
        arch.part("model.vision.weight")


def test_layer_index_is_the_number_of_the_decoder_block(tiny_model):
    arch = Checkpoint(tiny_model).arch
    assert arch.layer_index("model.layers.1.mlp.up_proj.weight") == 1
    assert arch.layer_index("model.norm.weight") is None


def test_input_groups_name_what_scales_can_be_folded_into(tiny_model, tiny_narrow):
    arch = Checkpoint(tiny_model).arch
    assert {group.before for group in arch.input_groups(1)} == {
        "model.layers.1.input_layernorm",
        None,  # o_proj: heads of v are shared
        "model.layers.1.post_attention_layernorm",
        "model.layers.1.mlp.up_proj",
    }
    members = []
    for layer in range(arch.layers):
        for group in arch.input_groups(layer):
            members += group.linears
    assert sorted(members) == sorted(arch.linears())

    narrow = Checkpoint(tiny_narrow).arch
    assert not narrow.tied
    assert narrow.head == "lm_head.weight"
    assert narrow.input_groups(0)[1] == InputGroup(
        ("model.layers.0.self_attn.o_proj",),
        "model.layers.0.self_attn.v_proj",
    )


def test_input_groups_have_the_offset_of_norms_alone(make_model, tmp_path):
    arch = Checkpoint(make_model(tmp_path / "model", "gemma2", **SIZES["gemma2"])).arch
    offsets = {group.before: group.norm_offset for group in arch.input_groups(0)}
    assert offsets == {
        "model.layers.0.input_layernorm": 1.0,
        None: 0.0,  # o_proj: heads of v are shared
        "model.layers.0.pre_feedforward_layernorm": 1.0,
        "model.layers.0.mlp.up_proj": 0.0,
    }


def test_architecture_from_config_reads_a_rotated_share_by_its_older_name(make_model, tmp_path):
    folder = make_model(tmp_path / "model", "gpt_neox", tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    arch = architecture_from_config(config)
    assert (arch.rotary_dim, arch.rope_theta, arch.kv_heads) == (16, 10000, 4)
    del config["rope_parameters"]
    older = architecture_from_config(config | {"rotary_pct": 0.5, "rotary_emb_base": 20000})
    assert (older.rotary_dim, older.rope_theta, older.rope_scaling) == (32, 20000, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "nonesuch"}, ", ".join(FAMILIES)),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"vocab_size": "384"}, "vocab_size"),
    ],
)
def test_architecture_from_config_refuses_what_it_does_not_support(change, words, tiny_model):
    config = json.loads((tiny_model / "config.json").read_text()) | change
    with pytest.raises(StageError, match=words) as error:
        architecture_from_config(config)
    assert error.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
