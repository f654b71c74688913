"""GGUF: the real llama.cpp agrees with torch, and every tensor reads back."""

import json
import shutil

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file

from quantline.config.compose import compose
from quantline.errors import Failure, StageError
from quantline.formats.bundle.tokenizer_metadata import metadata_differences
from quantline.formats.container import load_container
from quantline.formats.gguf.architectures import gguf_names
from quantline.formats.gguf.container import header_bytes, padded_size
from quantline.methods.ggml import mixes
from quantline.methods.ggml.quantize import quantize_blocks
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.store import QuantizedModel, QuantizedWriter
from quantline.quantized.tensors import GgmlBlocks
from quantline.runtimes.runtime import open_runtime
from quantline.runtimes.smoke.tokenizer_parity import TEXTS, compare_tokenizers
from quantline.text.tokenizer import Tokenizer
from tests.helpers.gguf import file_of, write_unquantized
from tests.helpers.project import ROOT
from tests.helpers.quantized import (
    differing,
    rounded,
    tokens_of,
    torch_greedy,
    torch_logprobs,
    torch_model,
)
from tests.helpers.variants import GEMMA, write_variant

CONTAINER = load_container("gguf")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(32)],
    "long_factor": [2.0 + i / 4 for i in range(32)],
    "rope_theta": 10000.0,
}
UNTIED = {"tie_word_embeddings": False}
# What a model is like → its family and its sizes.
MODELS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "untied": ("llama", UNTIED | {"num_key_value_heads": 4}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"num_attention_heads": 8}),
    "yarn": ("qwen3", {"rope_parameters": YARN}),
    "yarn with its own attention factor": (
        "qwen2",
        {"rope_parameters": YARN | {"attention_factor": 1.3}},
    ),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}),
    "gemma3 with every layer sliding": (
        "gemma3_text",
        GEMMA | {"layer_types": ["sliding_attention"] * 2},
    ),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", UNTIED),
    "gpt_neox one after the other": ("gpt_neox", UNTIED | {"use_parallel_residual": False}),
    "mixtral": ("mixtral", UNTIED | {"num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
        },
    ),
    "starcoder2": ("starcoder2", {"sliding_window": 64}),
    "phi": ("phi", UNTIED | {"num_key_value_heads": 4}),
    "phi3": ("phi3", UNTIED),
    "phi3 long": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256},
    ),
    "phi3 beyond the original length": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_write_in_f32_agrees_with_torch(name, tmp_path, make_model):
    family, sizes = MODELS[name]
    source = make_model(tmp_path / "model", family, **sizes)
    written = write_unquantized(tmp_path, source, "float32")
    tokens = tokens_of(written.source, 2, 48)
    found = open_runtime("llama.cpp", written.bundle, 1).logprobs(tokens)
    expected = torch_logprobs(torch_model(written.source, written.quantized), tokens)
    # llama.cpp looks the GELU up in a table in half precision.
    tolerance = 3e-3 if family.startswith(("gemma", "gpt", "starcoder")) else 1e-3
    assert np.abs(found - expected).max() <= tolerance


def test_write_in_f32_of_the_demo_answers_as_torch_does(tmp_path):
    """Greedily, on the pipeline's smoke prompts, up to the token that ends a text."""
    evaluation = compose(root=ROOT)["evaluation"]
    written = write_unquantized(tmp_path, ROOT / "demo/model", "float32")
    runtime = open_runtime("llama.cpp", written.bundle, 1)
    model = torch_model(written.source, written.quantized)
    tokenizer = Tokenizer(written.source.folder)
    end = tokenizer.special("eos_token")
    count = evaluation["smoke_tokens"]
    assert evaluation["smoke_prompts"]
    for prompt in evaluation["smoke_prompts"]:
        ids = tokenizer.prompt(prompt)
        expected = torch_greedy(model, np.array([ids], np.int32), count)
        if end in expected:
            expected = expected[: expected.index(end)]
        found = runtime.generate(ids, count, {end})
        assert found == expected, prompt
        assert len(found) > 2
        assert runtime.decode(found) == tokenizer.decode(expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", None])
def test_read_back_gives_floats_exactly(dtype, tmp_path, tiny_model):
    written = write_unquantized(tmp_path, tiny_model, dtype)
    stored = CONTAINER.read_back(written.bundle, written.source)
    assert set(stored) == set(written.source.names)
    types = {name: tensor.type for name, tensor in stored.items()}
    assert types == written.requested
    assert differing(CONTAINER, written.bundle, written.source, written.quantized) == []


def test_read_back_gives_ggml_blocks_in_the_source_row_order(tmp_path, tiny_model):
    source = Checkpoint(tiny_model)
    folder = tmp_path / "quantized"
    folder.mkdir()
    writer = QuantizedWriter(folder)
    traits = mixes.ModelTraits(source.arch.layers, source.arch.tied)
    names = gguf_names(source)
    tensors = {}
    for name in source.names:
        tensor = source.tensor(name)
        ggml_type = mixes.requested_type("Q4_K_M", names[name], tensor.ndim, traits)
        data = quantize_blocks(np.atleast_2d(tensor), ggml_type)
        writer.add_ggml_blocks(name, GgmlBlocks(ggml_type, data, tensor.shape))
        tensors[name] = {"requested": ggml_type, "actual": ggml_type}
    recipe = {"name": "q4_k_m", "mix": "Q4_K_M"}
    writer.close({"recipe": recipe, "transforms": [], "calibration": {}, "tensors": tensors})
    quantized = QuantizedModel(folder)
    write_variant("gguf", tmp_path / "bundle", source, quantized)
    stored = CONTAINER.read_back(tmp_path / "bundle", source)
    assert {tensor.type for tensor in stored.values()} == {"F32", "Q4_K", "Q6_K"}
    assert differing(CONTAINER, tmp_path / "bundle", source, quantized) == []


def test_write_splits_a_large_model_into_several_files(tmp_path, make_model):
    source = Checkpoint(make_model(tmp_path / "model", num_hidden_layers=3))
    quantized = rounded(tmp_path / "quantized", source, bits=0)
    one = tmp_path / "one"
    several = tmp_path / "several"
    write_variant("gguf", one, source, quantized, dtype="float32")
    write_variant("gguf", several, source, quantized, dtype="float32", split_max_mib=2)
    files = sorted(several.iterdir())
    assert len(files) > 3
    assert files[0].name.endswith(f"-F32-00001-of-{len(files):05d}.gguf")
    assert max(path.stat().st_size for path in files) < 2.1 * 2**20
    assert differing(CONTAINER, several, source, quantized) == []
    assert metadata_differences(CONTAINER, several, Tokenizer(source.folder)) == {}
    tokens = tokens_of(source)
    logprobs = [open_runtime("llama.cpp", path, 1).logprobs(tokens) for path in (one, several)]
    assert np.array_equal(*logprobs)


def test_header_bytes_is_at_most_an_alignment_above_the_files(tmp_path, tiny_model):
    written = write_unquantized(tmp_path, tiny_model, "float32")
    stored = CONTAINER.read_back(written.bundle, written.source)
    weights = sum(padded_size(tensor.bytes) for tensor in stored.values())
    size = file_of(written.bundle).stat().st_size
    estimate = header_bytes(written.source, written.quantized.report) + weights
    assert 0 <= estimate - size <= 32


def test_write_keeps_the_tokenizer_in_many_scripts(tmp_path, tiny_model):
    written = write_unquantized(tmp_path, tiny_model, None)
    runtime = open_runtime("llama.cpp", written.bundle, 1)
    assert compare_tokenizers(runtime, Tokenizer(tiny_model)) == ([], len(TEXTS))


def test_write_puts_chat_template_and_special_tokens_into_the_file(tmp_path, tiny_model):
    written = write_unquantized(tmp_path, tiny_model, None)
    fields = GGUFReader(file_of(written.bundle)).fields
    tokenizer = Tokenizer(tiny_model)
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.special("eos_token")
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"


def test_write_refuses_a_tokenizer_that_llama_cpp_has_no_equal_of(tmp_path, tiny_model):
    source = shutil.copytree(tiny_model, tmp_path / "model")
    path = source / "tokenizer.json"
    spec = json.loads(path.read_text())
    path.write_text(json.dumps(spec | {"pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(StageError, match="Whitespace") as caught:
        write_unquantized(tmp_path, source, None)
    assert caught.value.failure == Failure.TOKENIZER_MISMATCH


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (np.nan, None, "found NaN or infinity"),
        (np.inf, "float32", "found NaN or infinity"),
        (1e6, "float16", "that float16 holds"),
    ],
)
def test_write_refuses_weights_that_no_file_holds(value, dtype, words, tmp_path, tiny_model):
    source = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(StageError, match=words) as caught:
        write_unquantized(tmp_path, source, dtype)
    assert caught.value.failure == Failure.NON_FINITE
