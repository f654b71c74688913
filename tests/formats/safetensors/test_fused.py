"""Experts that a checkpoint holds in one tensor: whole where nothing is rounded, else apart."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantline.errors import Failure, StageError
from quantline.formats.bundle.verify_container import check_container
from quantline.formats.container import load_container
from quantline.ingest import verify
from quantline.model.checkpoint import Checkpoint
from quantline.runtimes.runtime import open_runtime
from tests.helpers.quantized import activations_rounded, differing, rounded, tokens_of
from tests.helpers.tensor_files import write_tensors
from tests.helpers.variants import write_variant


def read_tensors(folder):
    """Return what a folder's file holds."""
    return load_file(folder / "model.safetensors")


CONTAINER = load_container("safetensors")
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1},
    **{"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_model) -> Checkpoint:
    folder = make_model(tmp_path_factory.mktemp("fused") / "model", "gpt_oss", **SIZES)
    return Checkpoint(folder, structure=verify.check_blocks(Checkpoint(folder)))


def test_an_unquantized_bundle_has_the_stored_tensors(checkpoint, tmp_path):
    quantized = rounded(tmp_path / "q", checkpoint, bits=0)
    write_variant("safetensors", tmp_path / "out", checkpoint, quantized, dtype="float32")
    assert differing(CONTAINER, tmp_path / "out", checkpoint, quantized) == []
    source, bundle = read_tensors(checkpoint.folder), read_tensors(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in source.items()} == {
        name: tensor.shape for name, tensor in bundle.items()
    }


def test_quantized_experts_are_layers_that_transformers_joins(checkpoint, tmp_path):
    quantized = rounded(tmp_path / "q", checkpoint, 8, 32, symmetric=True)
    write_variant("safetensors", tmp_path / "out", checkpoint, quantized)
    names = set(read_tensors(tmp_path / "out"))
    assert "model.layers.0.mlp.experts.3.up_proj.weight_packed" in names
    assert "model.layers.0.mlp.experts.gate_up_proj" not in names
    assert "model.layers.0.mlp.experts.gate_up_proj_bias" in names  # nothing of it is rounded
    assert differing(CONTAINER, tmp_path / "out", checkpoint, quantized) == []
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "lm_head" in config["quantization_config"]["ignore"]
    tokens = tokens_of(checkpoint)
    found = open_runtime("transformers", tmp_path / "out", 1).logprobs(tokens)
    expected = open_runtime("transformers", checkpoint.folder, 1).logprobs(tokens)
    assert 0 < np.abs(found - expected).max() < 0.1


def test_experts_in_float8_are_joined_too(checkpoint, tmp_path):
    quantized = activations_rounded(tmp_path / "q", checkpoint, "float8")
    write_variant("safetensors", tmp_path / "out", checkpoint, quantized)
    values = {f"{name}.weight": quantized.linear(name).dequantize() for name in quantized.linears}
    dense = rounded(tmp_path / "d", checkpoint, bits=0, overrides=values)
    write_variant("safetensors", tmp_path / "dense", checkpoint, dense, dtype="float32")
    tokens = tokens_of(checkpoint)
    found, expected, unrounded = (
        open_runtime("transformers", folder, 1).logprobs(tokens)
        for folder in (tmp_path / "out", tmp_path / "dense", checkpoint.folder)
    )
    # The server rounds the inputs of the attention's layers as well.
    assert np.abs(found - expected).mean() < np.abs(unrounded - expected).mean()


def test_a_tower_that_changed_by_a_bit_is_noticed(tmp_path, make_model):
    """What the text model is not made of is handed on as it is."""
    sizes = {**SIZES, "num_local_experts": None, "num_experts_per_tok": None}
    folder = make_model(tmp_path / "model", "olmo2", **{k: v for k, v in sizes.items() if v})
    structure = verify.check_blocks(Checkpoint(folder))
    tower = {"vision.weight": np.ones((8, 8), np.float32)}
    write_tensors(folder / "model.safetensors", read_tensors(folder) | tower)
    from dataclasses import replace

    source = Checkpoint(folder, structure=replace(structure, passed=("vision.weight",)))
    quantized = rounded(tmp_path / "q", source, 4, 32, symmetric=True)
    out = tmp_path / "out"
    requested = CONTAINER.write(source, quantized, _made(out), _variant())
    tensors = check_container(CONTAINER, out, source, quantized, requested, True)
    assert tensors["vision.weight"]["actual"] == "F32"
    stored = read_tensors(out)
    stored["vision.weight"] = stored["vision.weight"].copy()
    stored["vision.weight"].view(np.int32)[0, 0] ^= 1
    write_tensors(out / "model.safetensors", stored)
    with pytest.raises(StageError, match=r"vision\.weight") as caught:
        check_container(CONTAINER, out, source, quantized, requested, True)
    assert caught.value.failure == Failure.READBACK_MISMATCH


def _made(folder):
    folder.mkdir()
    return folder


def _variant():
    from tests.helpers.variants import variant

    return variant("safetensors")
