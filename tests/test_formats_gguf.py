"""GGUF: the real llama.cpp agrees with torch, every tensor reads back, and what has no equal is refused by name."""

import json
import shutil

import numpy as np
import pytest
import yaml
from conftest import ROOT
from rounded import differing, rounded, tokens_of, torch_greedy, torch_logprobs, torch_model

from quantline.model.architecture import architecture
from quantline.quantized.store import Quantized, QuantizedWriter
from quantline.model.checkpoint import Checkpoint
from quantline.text.tokenizer import Tokenizer
from quantline.config.params import Variant
from quantline.formats import tokenizer_metadata as vocabulary
from quantline.formats.gguf import container as gguf
from quantline.formats.gguf.architectures import interleave
from quantline.formats.gguf.pretokenizers import pre_tokenizer_names
from quantline.methods.ggml import mixes, quantize as kquant
from quantline.runtimes.runtime import open_runtime
from quantline.runtimes.tokenizer_parity import TEXTS, mismatches
from quantline.errors import Failure, StageError


def variant(dtype: str | None = None) -> Variant:
    return Variant(recipe="none", format="gguf", runtime="llama.cpp", dtype=dtype)


def write_plain(folder, source, dtype: str | None):
    model = Checkpoint(source)
    quantized = rounded(folder / "quantized", model, bits=0)
    (folder / "bundle").mkdir()
    requested = gguf.write(model, quantized, folder / "bundle", variant(dtype))
    return model, quantized, folder / "bundle", requested


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
          "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0 + i / 8 for i in range(32)], "rope_theta": 10000.0,
        "long_factor": [2.0 + i / 4 for i in range(32)]}
GEMMA = {"query_pre_attn_scalar": 64, "sliding_window": 16}
MODELS = {
    "llama": ("llama", {}), "llama with biases": ("llama", {"attention_bias": True}),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
    "untied": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "mistral": ("mistral", {}), "qwen2": ("qwen2", {}), "qwen3": ("qwen3", {"num_attention_heads": 8}),
    "yarn": ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                                           "rope_theta": 10000.0}}),
    "yarn with its own attention factor": ("qwen2", {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3,
        "rope_theta": 10000.0}}),
    "gemma2": ("gemma2", GEMMA), "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}),
    "gemma3 with every layer sliding": ("gemma3_text", GEMMA | {"layer_types": ["sliding_attention"] * 2}),
    "gpt2": ("gpt2", {}), "gpt_neox": ("gpt_neox", {"tie_word_embeddings": False}),
    "gpt_neox one after the other": ("gpt_neox", {"tie_word_embeddings": False, "use_parallel_residual": False}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "tie_word_embeddings": False}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 96,
                                "norm_topk_prob": True}),
    "starcoder2": ("starcoder2", {"sliding_window": 64}),
    "phi": ("phi", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "phi3": ("phi3", {"tie_word_embeddings": False}),
    "phi3 long": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 256}),
    "phi3 beyond the original length": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_f32_file_agrees_with_torch(name, tmp_path, make_model):
    family, sizes = MODELS[name]
    model, quantized, bundle, _ = write_plain(tmp_path, make_model(tmp_path / "model", family, **sizes), "float32")
    tokens = tokens_of(model, 2, 48)
    found = open_runtime("llama.cpp", bundle, 1).logprobs(tokens)
    # llama.cpp looks the GELU up in a table in half precision.
    room = 3e-3 if family.startswith(("gemma", "gpt", "starcoder")) else 1e-3
    assert np.abs(found - torch_logprobs(torch_model(model, quantized), tokens)).max() <= room


WRONG = {
    "dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
    "another yarn": ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "rope_theta": 1e4,
                                                   "original_max_position_embeddings": 64}}, "beta_fast"),
    "longrope in a llama": ("llama", {"rope_parameters": LONG}, "'longrope'"),
    "another scale of attention": ("gemma2", GEMMA | {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar 64"),
    "no softcap in Gemma 2": ("gemma2", GEMMA | {"attn_logit_softcapping": None}, "a number for attn_logit_softcapping"),
    "weights of experts that do not add up to one": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob True"),
    "another scale in each layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx False, found True"),
    "too few factors": ("phi3", {"rope_parameters": LONG | {"long_factor": [1.0]}, "original_max_position_embeddings": 64},
                        "expected 32 numbers for rope_factors_long.weight, found 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, tmp_path, make_model):
    family, sizes, words = WRONG[name]
    few = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32} if family == "qwen3_moe" else {}
    source, changed = make_model(tmp_path / "model", family, **few), {"rope_scaling": None} | sizes
    config = json.loads((source / "config.json").read_text()) | changed
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match=words) as caught:
        write_plain(tmp_path, source, "float32")
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_generation_is_greedy_decoding_by_torch(tmp_path, tiny_model):
    model, quantized, bundle, _ = write_plain(tmp_path, tiny_model, "float32")
    runtime, prompt = open_runtime("llama.cpp", bundle, 1), [5, 80, 33]
    new = runtime.generate(prompt, 6, set())
    torch_model_, ids = torch_model(model, quantized), list(prompt)
    for _ in range(6):
        ids.append(int(torch_logprobs(torch_model_, np.array([ids], np.int32))[0, -1].argmax()))
    assert new == ids[3:]
    assert runtime.generate(prompt, 6, {new[2]}) == new[:new.index(new[2])]


def test_the_demos_f32_file_writes_the_text_that_torch_writes(tmp_path):
    """Greedily, on the pipeline's smoke prompts, up to the token that ends a text."""
    evaluation = yaml.safe_load((ROOT / "conf/evaluation/demo.yaml").read_text())
    model, quantized, bundle, _ = write_plain(tmp_path, ROOT / "demo/model", "float32")
    runtime, made, source = open_runtime("llama.cpp", bundle, 1), torch_model(model, quantized), Tokenizer(model.folder)
    end, count = source.special("eos_token"), evaluation["smoke_tokens"]
    for prompt in evaluation["smoke_prompts"]:
        ids = source.prompt(prompt)
        wanted = torch_greedy(made, np.array([ids], np.int32), count)
        wanted = wanted[:wanted.index(end)] if end in wanted else wanted
        found = runtime.generate(ids, count, {end})
        assert found == wanted and len(found) > 2, prompt
        assert runtime.decode(found) == source.decode(wanted)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", None])
def test_floats_read_back_exactly(dtype, tmp_path, tiny_model):
    model, quantized, bundle, requested = write_plain(tmp_path, tiny_model, dtype)
    held = gguf.read_back(bundle, model)
    assert set(held) == set(model.names)
    for name, tensor in held.items():
        assert tensor.type == requested[name]
        assert np.array_equal(tensor.dequantize(), gguf.expected(model, quantized, name, tensor.type)), name


def test_ggml_blocks_read_back_in_the_source_row_order(tmp_path, tiny_model):
    model = Checkpoint(tiny_model)
    facts = architecture(model)
    folder = tmp_path / "quantized"
    folder.mkdir()
    writer, tensors, names = QuantizedWriter(folder), {}, gguf.tensor_names(model, facts)
    for name in model.names:
        tensor, known = model.tensor(name), mixes.Model(facts.layers, facts.tied)
        kind = mixes.requested_type("Q4_K_M", names[name], tensor.ndim, known)
        writer.add_blocks(name, kind, kquant.quantize(np.atleast_2d(tensor), kind), tensor.shape)
        tensors[name] = {"requested": kind, "actual": kind}
    writer.close({"recipe": {"name": "q4_k_m", "mix": "Q4_K_M"}, "transforms": [], "calibration": {}, "tensors": tensors})
    quantized, bundle = Quantized(folder), tmp_path / "bundle"
    bundle.mkdir()
    gguf.write(model, quantized, bundle, variant())
    held = gguf.read_back(bundle, model)
    assert {tensor.type for tensor in held.values()} == {"F32", "Q4_K", "Q6_K"}
    for name, tensor in held.items():
        assert np.array_equal(tensor.dequantize(), gguf.expected(model, quantized, name, tensor.type)), name


def test_a_large_model_lies_in_several_files(tmp_path, make_model):
    source = make_model(tmp_path / "model", num_hidden_layers=3)
    model, quantized = Checkpoint(source), rounded(tmp_path / "quantized", Checkpoint(source), bits=0)
    bundles = [tmp_path / "whole", tmp_path / "split"]
    for bundle, size in zip(bundles, (None, 2), strict=True):
        bundle.mkdir()
        gguf.write(model, quantized, bundle, variant("float32").model_copy(update={"split_max_mib": size}))
    names = sorted(path.name for path in bundles[1].iterdir())
    assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05d}.gguf"
    assert max(path.stat().st_size for path in bundles[1].iterdir()) < 2.1 * 2**20
    assert differing(gguf, bundles[1], model, quantized) == []
    assert vocabulary.differences(bundles[1], Tokenizer(source)) == {}
    tokens = tokens_of(model)
    whole, split = (open_runtime("llama.cpp", bundle, 1).logprobs(tokens) for bundle in bundles)
    assert np.array_equal(whole, split)


def test_rotary_pairs_are_put_side_by_side_within_each_head():
    assert interleave(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_file_tokenizes_as_the_source_in_many_scripts(tmp_path, tiny_model):
    _, _, bundle, _ = write_plain(tmp_path, tiny_model, None)
    wrong, compared = mismatches(open_runtime("llama.cpp", bundle, 1), Tokenizer(tiny_model))
    assert (wrong, compared) == ([], len(TEXTS))


def test_chat_template_and_special_tokens_are_in_the_file(tmp_path, tiny_model):
    from gguf import GGUFReader

    _, _, bundle, _ = write_plain(tmp_path, tiny_model, None)
    fields = GGUFReader(bundle / gguf.FILE).fields
    assert fields["tokenizer.chat_template"].contents() == Tokenizer(tiny_model).chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == Tokenizer(tiny_model).special("eos_token")
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"


def test_pre_tokenizers_are_told_apart():
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert pre_tokenizer_names(byte_level) == (("gpt-2", False),)
    assert pre_tokenizer_names(byte_level | {"add_prefix_space": True}) == ()
    assert pre_tokenizer_names({"type": "Whitespace"}) == ()
    assert pre_tokenizer_names(None) == ()


def test_a_tokenizer_without_an_equal_is_refused(tmp_path, tiny_model):
    source = shutil.copytree(tiny_model, tmp_path / "model")
    spec = json.loads((source / "tokenizer.json").read_text())
    spec["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(StageError, match="Whitespace") as caught:
        write_plain(tmp_path, source, None)
    assert caught.value.failure == Failure.TOKENIZER_MISMATCH


@pytest.mark.parametrize(("value", "dtype", "words"), [
    (np.nan, None, "found NaN or infinity"), (np.inf, "float32", "found NaN or infinity"), (1e6, "float16", "that float16 holds")])
def test_weights_that_no_file_holds_are_refused(value, dtype, words, tmp_path, tiny_model):
    from safetensors.numpy import load_file, save_file

    source = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(StageError, match=words) as caught:
        write_plain(tmp_path, source, dtype)
    assert caught.value.failure == Failure.NON_FINITE


def test_a_file_cut_short_is_a_named_failure(tmp_path, tiny_model):
    _, _, bundle, _ = write_plain(tmp_path, tiny_model, None)
    path = bundle / gguf.FILE
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(StageError, match="cannot load") as caught:
        open_runtime("llama.cpp", bundle, 1)
    assert caught.value.failure == Failure.RUNTIME_CRASHED
