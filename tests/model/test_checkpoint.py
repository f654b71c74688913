"""Reading a Hugging Face folder tensor by tensor, and nothing outside it."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from quantline.errors import Failure, StageError
from quantline.ingest import verify
from quantline.model.checkpoint import Checkpoint
from quantline.model.checkpoint_files import INDEX, inside
from tests.helpers.tensor_files import read_tensors, write_tensors


def test_checkpoint_reads_bfloat16_exactly(tiny_model):
    import torch
    from safetensors.torch import load_file as load_torch_file

    checkpoint = Checkpoint(tiny_model)
    expected = load_torch_file(tiny_model / "model.safetensors")
    assert checkpoint.names == sorted(expected)
    for name in checkpoint.names:
        assert checkpoint.stored_dtype(name) == "BF16"
        assert checkpoint.raw(name).dtype == ml_dtypes.bfloat16
        assert checkpoint.shape(name) == tuple(expected[name].shape)
        values = expected[name].to(torch.float32).numpy()
        assert np.array_equal(checkpoint.tensor(name), values)


def test_checkpoint_reads_shards_like_one_file(make_model, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    single = Checkpoint(make_model(tmp_path / "single", **sizes))
    sharded = Checkpoint(make_model(tmp_path / "sharded", max_shard_size="40KB", **sizes))
    assert len(set(sharded.files.values())) > 2
    assert sharded.names == single.names
    for name in single.names:
        assert np.array_equal(single.raw(name), sharded.raw(name))


def test_checkpoint_is_a_source_that_nothing_was_converted_in(tiny_model):
    checkpoint = Checkpoint(tiny_model)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not checkpoint.converted
    assert name in checkpoint
    assert "model.vision.weight" not in checkpoint
    assert checkpoint.optional("model.vision.weight") is None
    assert np.array_equal(checkpoint.optional(name), checkpoint.tensor(name))
    assert checkpoint.layer_of(name) == "model.layers.0.self_attn.q_proj"
    assert checkpoint.row_order(name) is None
    assert not checkpoint.keeps_float32(name)
    assert list(checkpoint.stamp()) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "a\\b", "", ".", 3, None])
def test_inside_refuses_names_that_leave_the_folder(name, tmp_path):
    with pytest.raises(StageError) as error:
        inside(tmp_path, name)
    assert error.value.failure == Failure.PATH_ESCAPE


@given(st.text(alphabet="ab./\\", max_size=12))
def test_inside_never_leads_outside(name):
    home = Path("/somewhere/model")
    try:
        path = inside(home, name)
    except StageError:
        return
    assert path.resolve().is_relative_to(home)
    assert path.resolve() != home


def test_checkpoint_refuses_an_index_that_lists_more_than_the_shards_hold(tiny_model, tmp_path):
    (tmp_path / "a.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    listed = [*Checkpoint(tiny_model).names, "model.extra.weight"]
    index = {"weight_map": dict.fromkeys(listed, "a.safetensors")}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(StageError, match=r"model\.extra\.weight"):
        Checkpoint(tmp_path)


def test_checkpoint_leaves_out_buffers_that_are_computed(tiny_model, tmp_path):
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = read_tensors(tiny_model)
    stored = tensors | {buffer: np.ones(32, np.float32)}
    write_tensors(tmp_path / "model.safetensors", stored)
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    assert Checkpoint(tmp_path).names == sorted(tensors)


def test_checkpoint_reads_a_bare_gpt2_with_stored_masks_as_the_same_model(make_model, tmp_path):
    """As the original GPT-2 lies on the Hub.

    Names lack their first part, masks lie beside the weights, and config.json has no n_inner.
    """
    folder = make_model(tmp_path / "complete", "gpt2", hidden_size=32, intermediate_size=None)
    complete = Checkpoint(folder)
    bare_folder = tmp_path / "bare"
    shutil.copytree(folder, bare_folder)
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    mask = {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)}
    save_file(tensors | mask, bare_folder / "model.safetensors")
    config = json.loads((bare_folder / "config.json").read_text())
    del config["n_inner"]
    (bare_folder / "config.json").write_text(json.dumps(config))

    bare = Checkpoint(bare_folder)
    assert bare.names == complete.names
    assert "transformer.h.0.attn.c_attn.weight" in bare.names
    assert bare.arch.intermediate_size == 128
    for name in bare.names:
        assert bare.shape(name) == complete.shape(name) == bare.raw(name).shape
        assert np.array_equal(bare.raw(name), complete.raw(name))
    assert bare.shape("transformer.h.0.attn.c_attn.weight") == (96, 32)
    transposed = tensors["h.1.mlp.c_proj.weight"].T
    assert np.array_equal(bare.raw("transformer.h.1.mlp.c_proj.weight"), transposed)
    parameters = [
        verify.check_checkpoint(Checkpoint(path))["parameters"] for path in (bare_folder, folder)
    ]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize("family", ["llama", "olmo2"])  # with a table and without one
def test_checkpoint_reads_bare_names_beside_a_head_of_its_own(make_model, tmp_path, family):
    folder = make_model(tmp_path / "complete", family, tie_word_embeddings=False)
    bare_folder = Path(shutil.copytree(folder, tmp_path / "bare"))
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" in tensors
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, bare_folder / "model.safetensors")
    found = Checkpoint(bare_folder)
    verify.check_checkpoint(found)
    assert np.array_equal(found.raw(found.arch.head), tensors["lm_head.weight"])
