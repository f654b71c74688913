"""safetensors holds exactly what it should, and transformers computes with it."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file

from quantline.formats.container import load_container
from quantline.formats.safetensors import shards
from quantline.model.checkpoint import Checkpoint
from quantline.runtimes.runtime import open_runtime
from tests.helpers.quantized import (
    activations_rounded,
    differing,
    rounded,
    tokens_of,
    torch_logprobs,
    torch_model,
)
from tests.helpers.variants import write_variant

CONTAINER = load_container("safetensors")
COPIED_FILES = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def written(folder, source, quantized, **options) -> dict[str, str]:
    return write_variant("safetensors", folder, source, quantized, **options)


def assert_equals_torch(folder, source, quantized) -> None:
    """transformers computes from the folder what torch computes with the stored weights."""
    tokens = tokens_of(source)
    found = open_runtime("transformers", folder, 1).logprobs(tokens)
    assert np.array_equal(found, torch_logprobs(torch_model(source, quantized), tokens))


def types_in(folder, source) -> dict[str, str]:
    stored = CONTAINER.read_back(folder, source)
    return {name: tensor.type for name, tensor in stored.items()}


@pytest.fixture
def source(tiny_model):
    return Checkpoint(tiny_model)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [
        (4, 32, False),
        (4, 128, True),
        (3, 32, False),
        (2, 32, False),
        (8, -1, True),
        (4, -1, False),
        (8, 64, False),
    ],
)
def test_write_packs_exactly_our_integers(tmp_path, source, bits, group_size, symmetric):
    quantized = rounded(tmp_path / "q", source, bits, group_size, symmetric)
    requested = written(tmp_path / "out", source, quantized)
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []
    assert requested == types_in(tmp_path / "out", source)
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = CONTAINER.read_back(tmp_path / "out", source)[name]
    groups = 1 if group_size == -1 else 256 // group_size
    zero_bits = 0 if symmetric else bits * groups  # of a row
    assert tensor.type == f"int{bits}"
    assert tensor.bytes == 512 * (256 * bits + 16 * groups + zero_bits) / 8 + 16
    assert_equals_torch(tmp_path / "out", source, quantized)


def round_tokens(rows, kind: str):
    """Round activations with a step for each token, as compressed-tensors defines it."""
    largest = rows.abs().amax(-1, keepdim=True)
    if kind == "int8":
        step = largest / 127.5
        return (rows / step).round().clamp(-128, 127) * step
    step = largest / 448
    return (rows / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_write_makes_transformers_round_activations_token_by_token(tmp_path, source, kind):
    quantized = activations_rounded(tmp_path / "q", source, kind)
    tokens = tokens_of(source)
    requested = written(tmp_path / "out", source, quantized)
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []
    assert requested == types_in(tmp_path / "out", source)
    tensor = CONTAINER.read_back(tmp_path / "out", source)["model.layers.0.mlp.up_proj.weight"]
    assert (tensor.type, tensor.bytes) == (kind, 512 * 256 + 512 * 2)
    model = torch_model(source, quantized)
    unrounded = torch_logprobs(model, tokens)
    for name in quantized.linears:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args: (round_tokens(args[0], kind),)
        )
    found = open_runtime("transformers", tmp_path / "out", 1).logprobs(tokens)
    error = np.abs(found - torch_logprobs(model, tokens)).mean()
    # An activation on the edge between two steps may fall to either.
    assert error < 0.05 * np.abs(found - unrounded).mean()


def test_read_back_sees_a_changed_eight_bit_value(tmp_path, source):
    quantized = activations_rounded(tmp_path / "q", source, "float8")
    module = "model.layers.1.self_attn.k_proj"
    written(tmp_path / "out", source, quantized)
    tensors = load_torch_file(tmp_path / "out/model.safetensors")
    tensors[f"{module}.weight"].view(torch.uint8).reshape(-1)[7] ^= 1
    save_torch_file(tensors, tmp_path / "out/model.safetensors")
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == [f"{module}.weight"]


def test_read_back_sees_a_changed_integer_scale_or_zero_point(tmp_path, source):
    quantized = rounded(tmp_path / "q", source)
    written(tmp_path / "out", source, quantized)
    path = tmp_path / "out/model.safetensors"
    module = "model.layers.1.self_attn.k_proj"
    tensors = load_file(path)
    changes = {"weight_packed": 1 << 7, "weight_zero_point": 1 << 30, "weight_scale": 1}
    for part, change in changes.items():
        changed = tensors[f"{module}.{part}"].copy()
        integer = {4: np.int32, 2: np.int16}[changed.itemsize]
        changed.reshape(-1)[3:4].view(integer)[:] ^= change
        save_file(tensors | {f"{module}.{part}": changed}, path)
        assert differing(CONTAINER, tmp_path / "out", source, quantized) == [f"{module}.weight"]
    save_file({name: tensor for name, tensor in tensors.items() if module not in name}, path)
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == [f"{module}.weight"]


def test_write_unquantized_copies_the_models_files_and_links_none(tmp_path, source):
    quantized = rounded(tmp_path / "q", source, bits=0)
    assert set(written(tmp_path / "out", source, quantized).values()) == {"BF16"}
    for name in COPIED_FILES:
        ours = tmp_path / "out" / name
        theirs = source.folder / name
        assert ours.read_bytes() == theirs.read_bytes()
        assert ours.stat().st_ino != theirs.stat().st_ino
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "F32"), ("float16", "F16")])
def test_write_in_another_dtype_than_the_sources(tmp_path, source, dtype, kind):
    quantized = rounded(tmp_path / "q", source, bits=0)
    requested = written(tmp_path / "out", source, quantized, dtype=dtype)
    assert set(requested.values()) == {kind}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    assert set(types_in(tmp_path / "out", source).values()) == {kind}
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []


def test_write_stores_what_the_method_changed_in_the_sources_dtype(tmp_path, source):
    name = "model.layers.0.input_layernorm.weight"
    norm = source.tensor(name) / np.float32(3)
    quantized = rounded(tmp_path / "q", source, overrides={name: norm})
    written(tmp_path / "out", source, quantized)
    stored = CONTAINER.read_back(tmp_path / "out", source)[name]
    assert stored.type == "BF16"
    values = stored.dequantize()
    assert np.array_equal(values, norm.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert not np.array_equal(values, norm)
    assert not np.array_equal(values, source.tensor(name))
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []


def test_write_of_several_files_has_an_index_that_transformers_follows(
    tmp_path, source, monkeypatch
):
    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    quantized = rounded(tmp_path / "q", source)
    written(tmp_path / "out", source, quantized)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []
    assert_equals_torch(tmp_path / "out", source, quantized)


def test_write_configures_by_compressed_tensors_own_schema(tmp_path, source):
    written(tmp_path / "out", source, rounded(tmp_path / "q", source, 4, 64, False))
    config = json.loads((tmp_path / "out/config.json").read_text())
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    assert parsed.quant_method == "compressed-tensors"
    assert parsed.format == "pack-quantized"
    assert parsed.ignore == ["lm_head"]
    weights = parsed.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size) == (4, 64)
    assert (weights.symmetric, weights.strategy) == (False, "group")
    assert config["tie_word_embeddings"]
    assert config["dtype"] == "bfloat16"


def test_write_of_rows_that_are_one_group_by_chance_is_not_per_channel(tmp_path, make_model):
    # The rows of down_proj are 128 wide.
    model = make_model(tmp_path / "m", hidden_size=256, intermediate_size=128)
    source = Checkpoint(model)
    quantized = rounded(tmp_path / "q", source, 4, 128)
    written(tmp_path / "out", source, quantized)
    assert_equals_torch(tmp_path / "out", source, quantized)
