"""Reading and writing safetensors tensor by tensor, architecture facts, and the canonical layout."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from quantline.ingest import verify
from quantline.model.architecture import architecture, from_config
from quantline.quantized.store import GroupedLinear, Quantized, QuantizedWriter
from quantline.model.families import FAMILIES
from quantline.model.checkpoint import INDEX, Checkpoint, inside
from quantline.model.safetensors_writer import SafetensorsStream
from quantline.errors import Failure, StageError


def test_bfloat16_is_read_exactly(tiny_model):
    import torch
    from safetensors.torch import load_file as torch_load

    checkpoint, wanted = Checkpoint(tiny_model), torch_load(tiny_model / "model.safetensors")
    assert checkpoint.names == sorted(wanted)
    for name in checkpoint.names:
        assert checkpoint.stored_dtype(name) == "BF16"
        assert checkpoint.raw(name).dtype == ml_dtypes.bfloat16
        assert checkpoint.shape(name) == tuple(wanted[name].shape)
        assert np.array_equal(checkpoint.tensor(name), wanted[name].to(torch.float32).numpy())


def test_shards_read_like_one_file(make_model, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    one = Checkpoint(make_model(tmp_path / "one", **sizes))
    many = Checkpoint(make_model(tmp_path / "many", max_shard_size="40KB", **sizes))
    assert len(set(many.files.values())) > 2 and many.names == one.names
    assert all(np.array_equal(one.raw(name), many.raw(name)) for name in one.names)


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "a\\b", "", ".", 3, None])
def test_names_that_leave_the_folder_are_refused(name, tmp_path):
    with pytest.raises(StageError) as error:
        inside(tmp_path, name)
    assert error.value.failure == Failure.PATH_ESCAPE


@given(st.text(alphabet="ab./\\", max_size=12))
def test_no_name_leads_outside(name):
    from pathlib import Path

    home = Path("/somewhere/model")
    try:
        found = inside(home, name)
    except StageError:
        return
    assert found.resolve().is_relative_to(home) and found.resolve() != home


def test_an_index_that_lists_more_than_the_shards_hold_is_refused(tiny_model, tmp_path):
    (tmp_path / "a.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    listed = dict.fromkeys([*Checkpoint(tiny_model).names, "model.extra.weight"], "a.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(StageError, match="model.extra.weight"):
        Checkpoint(tmp_path)


def test_computed_buffers_are_not_part_of_the_model(tiny_model, tmp_path):
    base = Checkpoint(tiny_model)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with SafetensorsStream(tmp_path / "model.safetensors", [*base.names, buffer]) as stream:
        for name in base.names:
            stream.add(name, base.raw(name))
        stream.add(buffer, np.ones(32, np.float32))
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    assert Checkpoint(tmp_path).names == base.names


def test_streamed_files_are_ordinary_safetensors(tmp_path):
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((0, 4), np.float16),
               "half": np.array([1.5, -2], ml_dtypes.bfloat16), "scalar": np.float32(7).reshape(()),
               "turned": np.arange(6, dtype=np.int32).reshape(2, 3).T}
    with SafetensorsStream(tmp_path / "x.safetensors", [*tensors, "never"]) as stream:
        for name, tensor in tensors.items():
            stream.add(name, tensor)
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and np.array_equal(found[name], tensor), name
    with pytest.raises(ValueError, match="twice"), SafetensorsStream(tmp_path / "y", ["a"]) as stream:
        stream.add("a", tensors["a"])
        stream.add("a", tensors["a"])


def test_architecture_of_the_tiny_models(tiny_model, tiny_narrow):
    checkpoint = Checkpoint(tiny_model)
    facts = architecture(checkpoint)
    assert (facts.hidden_size, facts.layers, facts.heads, facts.kv_heads, facts.head_dim) == (256, 2, 4, 2, 64)
    assert facts.tied and facts.head == facts.embedding == "model.embed_tokens.weight"
    linears = [name.removesuffix(".weight") for name in checkpoint.names if "_proj" in name]
    assert sorted(facts.linears()) == linears
    assert facts.linears()[0] == "model.layers.0.self_attn.q_proj"
    roles = {facts.role(name) for name in checkpoint.names}
    assert roles == {"token_embd", "output_norm", "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm",
                     "ffn_gate", "ffn_up", "ffn_down"}
    assert facts.layer_index("model.layers.1.mlp.up_proj.weight") == 1
    assert facts.layer_index(facts.final_norm) is None
    with pytest.raises(StageError, match="no known part"):
        facts.role("model.vision.weight")

    narrow = architecture(Checkpoint(tiny_narrow))
    assert not narrow.tied and narrow.head == "lm_head.weight"
    assert {before for _, before in facts.input_groups(1)} == {
        "model.layers.1.input_layernorm", None, "model.layers.1.post_attention_layernorm", "model.layers.1.mlp.up_proj"}
    assert narrow.input_groups(0)[1] == (["model.layers.0.self_attn.o_proj"], "model.layers.0.self_attn.v_proj")
    members = [name for layer in range(2) for group, _ in facts.input_groups(layer) for name in group]
    assert sorted(members) == linears


def test_a_bare_gpt2_with_stored_masks_is_the_same_model(make_model, tmp_path):
    """As the original GPT-2 lies on the Hub: names without their first part, masks beside the weights, no n_inner."""
    folder = make_model(tmp_path / "whole", "gpt2", hidden_size=32, intermediate_size=None)
    whole, bare = Checkpoint(folder), tmp_path / "bare"
    shutil.copytree(folder, bare)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors | {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)}, bare / "model.safetensors")
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "n_inner"}))
    found = Checkpoint(bare)
    assert found.names == whole.names and "transformer.h.0.attn.c_attn.weight" in found.names
    assert architecture(found).intermediate_size == 128
    for name in found.names:
        assert found.shape(name) == whole.shape(name) == found.raw(name).shape
        assert np.array_equal(found.raw(name), whole.raw(name))
    assert found.shape("transformer.h.0.attn.c_attn.weight") == (96, 32)
    assert np.array_equal(found.raw("transformer.h.1.mlp.c_proj.weight"), tensors["h.1.mlp.c_proj.weight"].T)
    assert verify.check_whole(bare)["parameters"] == verify.check_whole(folder)["parameters"]


def test_a_rotated_share_is_read_by_its_older_name(make_model, tmp_path):
    config = json.loads((make_model(tmp_path / "model", "gpt_neox", tie_word_embeddings=False) / "config.json").read_text())
    assert (from_config(config).rotary_dim, from_config(config).rope_theta, from_config(config).kv_heads) == (16, 10000, 4)
    del config["rope_parameters"]
    older = from_config(config | {"rotary_pct": 0.5, "rotary_emb_base": 20000})
    assert (older.rotary_dim, older.rope_theta, older.rope_scaling) == (32, 20000, None)


@pytest.mark.parametrize(("change", "words"), [({"model_type": "nonesuch"}, ", ".join(FAMILIES)),
                                               ({"hidden_act": "gelu"}, "hidden_act"), ({"vocab_size": None}, None)])
def test_unsupported_configurations(change, words, tiny_model):
    config = json.loads((tiny_model / "config.json").read_text()) | change
    if words is None:
        del config["vocab_size"]
    with pytest.raises(StageError, match=words or "vocab_size") as error:
        from_config(config)
    assert error.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def random_linear(seed=0, bits=4):
    draw = np.random.default_rng(seed)
    return GroupedLinear(draw.integers(0, 1 << bits, (6, 64)).astype(np.uint8),
                         draw.random((6, 2), np.float32).astype(ml_dtypes.bfloat16).astype(np.float32),
                         draw.integers(0, 1 << bits, (6, 2)).astype(np.uint8), bits, 32, False)


def test_canonical_layout_survives_the_disk(tmp_path):
    linear, blocks = random_linear(), np.arange(288, dtype=np.uint8).reshape(2, 144)
    writer = QuantizedWriter(tmp_path)
    writer.add_linear("model.layers.0.mlp.up_proj", linear)
    writer.add_override("model.norm.weight", np.ones(4, np.float32) * 2)
    writer.add_blocks("model.embed_tokens.weight", "Q4_K", blocks, (2, 256))
    writer.close({"method": "test"})
    found = Quantized(tmp_path)
    assert found.linears == ["model.layers.0.mlp.up_proj"] and found.report["method"] == "test"
    again = found.linear("model.layers.0.mlp.up_proj")
    for field in ("integers", "scales", "zeros"):
        assert np.array_equal(getattr(again, field), getattr(linear, field))
    assert (again.bits, again.group_size, again.symmetric) == (4, 32, False)
    assert np.array_equal(found.override("model.norm.weight"), [2, 2, 2, 2])
    kind, data, shape = found.blocks("model.embed_tokens.weight")
    assert kind == "Q4_K" and np.array_equal(data, blocks) and shape == (2, 256)


def test_dequantizing_is_integers_less_zeros_times_scales():
    linear = random_linear()
    for row, column in [(0, 0), (3, 31), (3, 32), (5, 63)]:
        group = column // 32
        wanted = (float(linear.integers[row, column]) - linear.zeros[row, group]) * linear.scales[row, group]
        assert linear.dequantize()[row, column] == np.float32(wanted)


def test_a_layer_that_is_not_what_it_says_is_refused():
    good = random_linear()
    with pytest.raises(ValueError, match="bits"):
        GroupedLinear(good.integers, good.scales, good.zeros, 3, 32, False)
    with pytest.raises(ValueError, match="scales"):
        GroupedLinear(good.integers, good.scales[:, :1], good.zeros, 4, 32, False)
    with pytest.raises(StageError, match="finite"):
        GroupedLinear(good.integers, good.scales * np.nan, good.zeros, 4, 32, False)
