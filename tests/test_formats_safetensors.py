"""safetensors: the plain folder and compressed-tensors' layout hold exactly what they should, and transformers agrees."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from rounded import activations_rounded, differing, rounded, tokens_of, torch_logprobs, torch_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file

from quantline.model.checkpoint import Checkpoint
from quantline.config.params import Variant
from quantline.formats.safetensors import container as safetensors
from quantline.formats.safetensors.layouts.layout import one_scheme
from quantline.runtimes.runtime import open_runtime
from quantline.errors import StageError


def written(folder, model, quantized, dtype=None):
    folder.mkdir()
    variant = Variant(recipe="rounded", format="safetensors", runtime="transformers", dtype=dtype)
    return safetensors.write(model, quantized, folder, variant)


@pytest.fixture
def model(tiny_model):
    return Checkpoint(tiny_model)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [
    (4, 32, False), (4, 128, True), (3, 32, False), (2, 32, False), (8, -1, True), (4, -1, False), (8, 64, False)])
def test_transformers_computes_with_exactly_our_integers(tmp_path, model, bits, group_size, symmetric):
    quantized = rounded(tmp_path / "q", model, bits, group_size, symmetric)
    requested = written(tmp_path / "out", model, quantized)
    assert differing(safetensors, tmp_path / "out", model, quantized) == []
    held = safetensors.read_back(tmp_path / "out", model)
    assert requested == {name: one.type for name, one in held.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    groups = 1 if group_size == -1 else 256 // group_size
    zeros = 0 if symmetric else bits * groups  # bits a row
    assert held[name].type == f"int{bits}"
    assert held[name].bytes == 512 * (256 * bits + 16 * groups + zeros) / 8 + 16
    tokens = tokens_of(model)
    ours = open_runtime("transformers", tmp_path / "out", 1).logprobs(tokens)
    assert np.array_equal(ours, torch_logprobs(torch_model(model, quantized), tokens))


def round_tokens(rows, kind: str):
    """Activations with a step for each token, as compressed-tensors defines it."""
    largest = rows.abs().amax(-1, keepdim=True)
    if kind == "int8":
        return (rows / (largest / 127.5)).round().clamp(-128, 127) * (largest / 127.5)
    return (rows / (largest / 448)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * (largest / 448)


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_transformers_rounds_activations_token_by_token(tmp_path, model, kind):
    quantized, tokens = activations_rounded(tmp_path / "q", model, kind), tokens_of(model)
    requested = written(tmp_path / "out", model, quantized)
    assert differing(safetensors, tmp_path / "out", model, quantized) == []
    held = safetensors.read_back(tmp_path / "out", model)
    assert requested == {name: one.type for name, one in held.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    assert (held[name].type, held[name].bytes) == (kind, 512 * 256 + 512 * 2)
    wanted = torch_model(model, quantized)
    unrounded = torch_logprobs(wanted, tokens)
    for one in quantized.linears:
        wanted.get_submodule(one).register_forward_pre_hook(lambda _, args: (round_tokens(args[0], kind),))
    found = open_runtime("transformers", tmp_path / "out", 1).logprobs(tokens)
    off = np.abs(found - torch_logprobs(wanted, tokens)).mean()
    assert off < 0.05 * np.abs(found - unrounded).mean()  # an activation on the edge between two steps may fall to either


def test_a_changed_eight_bit_value_is_seen(tmp_path, model):
    quantized, module = activations_rounded(tmp_path / "q", model, "float8"), "model.layers.1.self_attn.k_proj"
    written(tmp_path / "out", model, quantized)
    tensors = load_torch_file(tmp_path / "out/model.safetensors")
    tensors[f"{module}.weight"].view(torch.uint8).reshape(-1)[7] ^= 1
    save_torch_file(tensors, tmp_path / "out/model.safetensors")
    assert differing(safetensors, tmp_path / "out", model, quantized) == [f"{module}.weight"]


def test_a_changed_integer_scale_or_zero_point_is_seen(tmp_path, model):
    quantized = rounded(tmp_path / "q", model)
    written(tmp_path / "out", model, quantized)
    path, module = tmp_path / "out/model.safetensors", "model.layers.1.self_attn.k_proj"
    tensors = load_file(path)
    for part, change in (("weight_packed", 1 << 7), ("weight_zero_point", 1 << 30), ("weight_scale", 1)):
        changed = tensors[f"{module}.{part}"].copy()
        changed.reshape(-1)[3:4].view({4: np.int32, 2: np.int16}[changed.itemsize])[:] ^= change
        save_file(tensors | {f"{module}.{part}": changed}, path)
        assert differing(safetensors, tmp_path / "out", model, quantized) == [f"{module}.weight"]
    save_file({name: one for name, one in tensors.items() if module not in name}, path)
    assert differing(safetensors, tmp_path / "out", model, quantized) == [f"{module}.weight"]


def test_recipe_none_is_the_models_own_files_and_no_hard_link_to_them(tmp_path, model):
    quantized = rounded(tmp_path / "q", model, bits=0)
    assert set(written(tmp_path / "out", model, quantized).values()) == {"BF16"}
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                 "generation_config.json"):
        ours, theirs = tmp_path / "out" / name, model.folder / name
        assert ours.read_bytes() == theirs.read_bytes() and ours.stat().st_ino != theirs.stat().st_ino
    assert differing(safetensors, tmp_path / "out", model, quantized) == []


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "F32"), ("float16", "F16")])
def test_another_dtype_than_the_sources(tmp_path, model, dtype, kind):
    quantized = rounded(tmp_path / "q", model, bits=0)
    assert set(written(tmp_path / "out", model, quantized, dtype).values()) == {kind}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    assert {one.type for one in safetensors.read_back(tmp_path / "out", model).values()} == {kind}
    assert differing(safetensors, tmp_path / "out", model, quantized) == []


def test_what_the_method_changed_takes_the_sources_place_in_the_sources_dtype(tmp_path, model):
    name = "model.layers.0.input_layernorm.weight"
    norm = model.tensor(name) / np.float32(3)
    quantized = rounded(tmp_path / "q", model, overrides={name: norm})
    written(tmp_path / "out", model, quantized)
    held = safetensors.read_back(tmp_path / "out", model)[name]
    assert held.type == "BF16"
    assert np.array_equal(held.dequantize(), norm.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert not np.array_equal(held.dequantize(), norm) and not np.array_equal(held.dequantize(), model.tensor(name))
    assert differing(safetensors, tmp_path / "out", model, quantized) == []


def test_several_files_have_an_index_that_transformers_follows(tmp_path, model, monkeypatch):
    monkeypatch.setattr(safetensors, "SHARD_BYTES", 200_000)
    quantized = rounded(tmp_path / "q", model)
    written(tmp_path / "out", model, quantized)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 2
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert differing(safetensors, tmp_path / "out", model, quantized) == []
    tokens = tokens_of(model)
    ours = open_runtime("transformers", tmp_path / "out", 1).logprobs(tokens)
    assert np.array_equal(ours, torch_logprobs(torch_model(model, quantized), tokens))


def test_the_configuration_is_compressed_tensors_own(tmp_path, model):
    from compressed_tensors.quantization import QuantizationConfig

    written(tmp_path / "out", model, rounded(tmp_path / "q", model, 4, 64, False))
    config = json.loads((tmp_path / "out/config.json").read_text())
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    weights = parsed.config_groups["group_0"].weights
    assert (parsed.quant_method, parsed.format, parsed.ignore) == ("compressed-tensors", "pack-quantized", ["lm_head"])
    assert (weights.num_bits, weights.group_size, weights.symmetric, weights.strategy) == (4, 64, False, "group")
    assert config["tie_word_embeddings"] and config["dtype"] == "bfloat16"


def test_rows_that_are_one_group_by_chance_do_not_make_the_scheme_per_channel(tmp_path, make_model):
    model = Checkpoint(make_model(tmp_path / "m", hidden_size=256, intermediate_size=128))  # down_proj's rows are 128
    quantized = rounded(tmp_path / "q", model, 4, 128)
    written(tmp_path / "out", model, quantized)
    tokens = tokens_of(model)
    ours = open_runtime("transformers", tmp_path / "out", 1).logprobs(tokens)
    assert np.array_equal(ours, torch_logprobs(torch_model(model, quantized), tokens))


def test_layers_of_unlike_schemes_are_refused(tmp_path):
    with pytest.raises(StageError, match="one width and group size"):
        one_scheme({("int4", False, 32, False): ["a"], ("int8", False, 32, False): ["b"]})
