"""Every model family goes through calibration, every integer method and the containers that know it, or is refused."""

import numpy as np
import pytest
from rounded import differing, rounded, tokens_of, torch_logprobs, torch_model

from stages.checkpoints.architecture import architecture
from stages.checkpoints.canonical import Quantized, QuantizedWriter
from stages.checkpoints.families import FAMILIES, tied
from stages.checkpoints.moments import ABOUT, Moments, collect
from stages.checkpoints.reader import Checkpoint
from stages.config import RECIPES, Variant
from stages.formats import gguf, onnx, safetensors
from stages.quantize import Work, integers_by_input, integers_by_layer
from stages.runtimes import open_runtime
from stages.tracking import Failure, StageError, write_json


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request, tmp_path_factory, make_model):
    """(checkpoint, its calibration with gradients) of a family."""
    folder = tmp_path_factory.mktemp(request.param)
    sizes = {"sliding_window": 16, "query_pre_attn_scalar": 16} if request.param.startswith("gemma") else {}
    checkpoint = Checkpoint(make_model(folder / "model", request.param, hidden_size=64, intermediate_size=96,
                                       num_key_value_heads=4, tie_word_embeddings=request.param != "phi3", **sizes))
    calibration = folder / "calibration"
    calibration.mkdir()
    tokens = tokens_of(checkpoint, 16, 40)
    layers = collect(checkpoint, tokens, calibration, seed=0)
    about = {"layers": layers, "curvature": True, "text_sha256": "0" * 64, "tokens": tokens.size, "seed": 0}
    write_json(calibration / ABOUT, about)
    return checkpoint, Moments(calibration)


def quantized(model, folder, **recipe) -> Quantized:
    checkpoint, moments = model
    folder.mkdir()
    facts, made = architecture(checkpoint), RECIPES[recipe["method"]](group_size=32, symmetric=False, **recipe)
    work = Work(made, checkpoint, facts, moments, QuantizedWriter(folder))
    for layer in range(facts.layers):
        done = (integers_by_input if recipe["method"] == "awq" else integers_by_layer)(work, layer)
        work.writer.close_part(f"block-{layer:03d}", done)
    work.writer.close({"recipe": recipe, "transforms": [], "calibration": moments.provenance()})
    return Quantized(folder)


def test_awq_leaves_the_function_as_it_is(model, tmp_path):
    """At 8 bits nothing but a wrong folding could move the logits."""
    checkpoint, tokens = model[0], tokens_of(model[0])
    folded = quantized(model, tmp_path / "awq", method="awq", bits=8)
    plain = torch_logprobs(torch_model(checkpoint, rounded(tmp_path / "none", checkpoint, bits=0)), tokens)
    assert folded.overrides and len(folded.linears) == len(architecture(checkpoint).linears())
    assert np.abs(torch_logprobs(torch_model(checkpoint, folded), tokens) - plain).mean() < 0.01


def test_curvature_rounding_is_loaded_by_transformers_as_it_was_made(model, tmp_path):
    checkpoint = model[0]
    made = quantized(model, tmp_path / "gptq", method="gptq", bits=4, curvature=True)
    (tmp_path / "out").mkdir()
    safetensors.write(checkpoint, made, tmp_path / "out", Variant(recipe="r", format="safetensors", runtime="transformers"))
    assert differing(safetensors, tmp_path / "out", checkpoint, made) == []
    tokens = tokens_of(checkpoint)
    found = open_runtime("transformers", tmp_path / "out", 1).logprobs(tokens)
    assert np.abs(found - torch_logprobs(torch_model(checkpoint, made), tokens)).max() < 1e-5


def test_onnx_agrees_with_torch(model, tmp_path):
    checkpoint, plain = model[0], rounded(tmp_path / "none", model[0], bits=0)
    (tmp_path / "out").mkdir()
    onnx.write(checkpoint, plain, tmp_path / "out", Variant(recipe="none", format="onnx", runtime="onnxruntime"))
    tokens, runtime = tokens_of(checkpoint, 2, 40), open_runtime("onnxruntime", tmp_path / "out", 1)
    assert np.abs(runtime.logprobs(tokens) - torch_logprobs(torch_model(checkpoint, plain), tokens)).max() < 1e-3


def test_gguf_agrees_with_torch(model, tmp_path):
    checkpoint, plain = model[0], rounded(tmp_path / "none", model[0], bits=0)
    (tmp_path / "out").mkdir()
    gguf.write(checkpoint, plain, tmp_path / "out", Variant(recipe="none", format="gguf", runtime="llama.cpp", dtype="float32"))
    tokens, runtime = tokens_of(checkpoint, 2, 40), open_runtime("llama.cpp", tmp_path / "out", 1)
    assert np.abs(runtime.logprobs(tokens) - torch_logprobs(torch_model(checkpoint, plain), tokens)).max() < 1e-3


@pytest.mark.parametrize(("config", "answer"), [
    ({"model_type": "gemma2"}, True), ({"model_type": "llama"}, False), ({"model_type": "llama", "tie_word_embeddings": True}, True),
    ({"model_type": "gemma3_text", "tie_word_embeddings": False}, False), ({}, False)])
def test_a_head_is_tied_as_transformers_takes_it(config, answer):
    assert tied(config) is answer
