"""Every model family goes through calibration, every integer method and the containers that know it, or is refused."""

import numpy as np
import pytest
from rounded import activations_rounded, differing, rounded, tokens_of, torch_greedy, torch_logprobs, torch_model

from quantline.ingest import verify
from quantline.model.architecture import architecture
from quantline.quantized.store import Quantized, QuantizedWriter
from quantline.model.families import FAMILIES, tied
from quantline.calibration.collect import ABOUT, Moments, collect
from quantline.model.checkpoint import Checkpoint
from quantline.config.params import Variant
from quantline.config.recipes import RECIPES
from quantline.formats.gguf import container as gguf
from quantline.formats.onnx import container as onnx
from quantline.formats.safetensors import container as safetensors
from quantline.recipes.dispatch import round_block
from quantline.recipes.context import Work
from quantline.runtimes.runtime import open_runtime
from quantline.errors import Failure, StageError
from quantline.files import write_json

GEMMA = {"sliding_window": 16, "query_pre_attn_scalar": 16}
SIZES = {"gemma2": GEMMA, "gemma3_text": GEMMA, "mixtral": {"num_local_experts": 4},
         "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 2}}
UNTIED = ("phi", "phi3", "gpt_neox", "mixtral")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request, tmp_path_factory, make_model):
    """(checkpoint, its calibration with gradients) of a family."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = Checkpoint(make_model(folder / "model", request.param, hidden_size=64, intermediate_size=96,
                                       num_key_value_heads=4, tie_word_embeddings=request.param not in UNTIED,
                                       **SIZES.get(request.param, {})))
    calibration = folder / "calibration"
    calibration.mkdir()
    tokens = tokens_of(checkpoint, 16, 40)
    layers = collect(checkpoint, tokens, calibration, seed=0)
    about = {"layers": layers, "curvature": True, "text_sha256": "0" * 64, "tokens": tokens.size, "seed": 0}
    write_json(calibration / ABOUT, about)
    return checkpoint, Moments(calibration)


def test_load_takes_it(model):
    """Names, shapes and values are what config.json asks for."""
    facts, checkpoint = architecture(model[0]), model[0]
    found = verify.check_whole(checkpoint.folder)
    assert found["parameters"] == sum(np.prod(checkpoint.shape(name)) for name in checkpoint.names)
    assert found["sizes"] == {"hidden": 64, "layers": 2, "heads": 4, "vocabulary": facts.vocab_size}
    assert all(facts.role(name) for name in checkpoint.names)
    assert {f"{name}.weight" for name in facts.linears()} <= set(checkpoint.names)
    for layer in range(facts.layers):
        assert sorted(name for group, _ in facts.input_groups(layer) for name in group) == sorted(facts.linears_of(layer))


def quantized(model, folder, **recipe) -> Quantized:
    checkpoint, moments = model
    folder.mkdir()
    grid = {"group_size": 32, "symmetric": False} if recipe["method"] in ("rtn", "gptq", "awq") else {}
    facts, made = architecture(checkpoint), RECIPES[recipe["method"]](**grid | recipe)
    work = Work(made, checkpoint, facts, moments, QuantizedWriter(folder))
    activations = {"activations": "dynamic"} if recipe["method"] in ("smoothquant", "fp8") else {}
    for layer in range(facts.layers):
        work.writer.close_part(f"block-{layer:03d}", round_block(work, layer))
    work.writer.close({"recipe": recipe, "transforms": [], "calibration": moments.provenance(), **activations})
    return Quantized(folder)


@pytest.mark.parametrize("recipe", [
    {"method": "rtn", "bits": 8}, {"method": "gptq", "bits": 8}, {"method": "awq", "bits": 8},
    {"method": "awq", "bits": 8, "rounding": "gptq", "curvature": True}, {"method": "smoothquant"}, {"method": "int8"},
    {"method": "fp8"}], ids=lambda recipe: "-".join(map(str, recipe.values())))
def test_every_method_at_eight_bits_leaves_the_function_nearly_as_it_is(model, recipe, tmp_path):
    checkpoint, tokens = model[0], tokens_of(model[0])
    made = quantized(model, tmp_path / "q", **recipe)
    assert made.linears == sorted(architecture(checkpoint).linears())
    plain = torch_logprobs(torch_model(checkpoint, rounded(tmp_path / "none", checkpoint, bits=0)), tokens)
    off = np.abs(torch_logprobs(torch_model(checkpoint, made), tokens) - plain).mean()
    assert 0 < off < (0.1 if recipe["method"] == "fp8" else 0.02)


def test_awq_folds_scales_into_weights_and_biases(model, tmp_path):
    checkpoint = model[0]
    folded = quantized(model, tmp_path / "awq", method="awq", bits=4)
    offset = architecture(checkpoint).family.norm_offset
    moved = {name: (folded.override(name) + offset) / (checkpoint.tensor(name) + offset) for name in folded.overrides}
    assert max(np.abs(ratio - 1).max() for ratio in moved.values()) > 0.05
    for name, ratio in moved.items():
        weight = f"{name.removesuffix('.bias')}.weight"
        if name.endswith(".bias") and weight in moved:
            assert np.allclose(ratio, moved[weight], rtol=1e-5)
    with_bias = {name for name in checkpoint.names if name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" in moved}
    assert with_bias <= set(moved)


@pytest.mark.parametrize("recipe", [{"method": "gptq", "bits": 4, "curvature": True}, {"method": "int8"}],
                         ids=["curvature", "int8"])
def test_packed_integers_are_loaded_by_transformers_as_they_were_made(model, recipe, tmp_path):
    checkpoint, facts = model[0], architecture(model[0])
    if facts.family.transposed:
        refused(checkpoint, quantized(model, tmp_path / "q", **recipe), tmp_path / "out", "has as Conv1D and loads from no layout")
        return
    if facts.experts and recipe["method"] == "gptq":
        recipe = recipe | {"symmetric": True}
    made = quantized(model, tmp_path / "q", **recipe)
    (tmp_path / "out").mkdir()
    safetensors.write(checkpoint, made, tmp_path / "out", Variant(recipe="r", format="safetensors", runtime="transformers"))
    assert differing(safetensors, tmp_path / "out", checkpoint, made) == []
    tokens = tokens_of(checkpoint)
    found = open_runtime("transformers", tmp_path / "out", 1).logprobs(tokens)
    # transformers expands experts in the precision of their scales.
    assert np.abs(found - torch_logprobs(torch_model(checkpoint, made, halved=".experts."), tokens)).max() < 1e-5


def refused(checkpoint, made, folder, words, **variant) -> None:
    """Writing safetensors is refused by name before anything is written."""
    folder.mkdir(exist_ok=True)
    with pytest.raises(StageError, match=words) as caught:
        safetensors.write(checkpoint, made, folder,
                          Variant(recipe="r", format="safetensors", runtime="transformers", **variant))
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE and not list(folder.iterdir())


@pytest.mark.parametrize("model", [name for name, family in sorted(FAMILIES.items()) if family.sparse], indirect=True)
def test_experts_that_transformers_does_not_load_are_refused(model, tmp_path):
    checkpoint = model[0]
    symmetric = rounded(tmp_path / "s", checkpoint, 4, 32, symmetric=True)
    refused(checkpoint, rounded(tmp_path / "a", checkpoint, 4, 32), tmp_path / "out", "neither transformers nor vLLM takes there")
    refused(checkpoint, symmetric, tmp_path / "out", "found gptq", layout="gptq")
    refused(checkpoint, symmetric, tmp_path / "out", "found awq", layout="awq")
    refused(checkpoint, activations_rounded(tmp_path / "i", checkpoint, "int8"), tmp_path / "out", "int8 with rounded activations")
    made = activations_rounded(tmp_path / "f", checkpoint, "float8")
    safetensors.write(checkpoint, made, tmp_path / "out", Variant(recipe="r", format="safetensors", runtime="transformers"))
    tokens = tokens_of(checkpoint)
    found = open_runtime("transformers", tmp_path / "out", 1).logprobs(tokens)
    assert np.abs(found - torch_logprobs(torch_model(checkpoint, made), tokens)).mean() < 0.05  # attention rounds its inputs


def test_safetensors_in_another_dtype_is_loaded_as_it_was_made(model, tmp_path):
    checkpoint, plain = model[0], rounded(tmp_path / "none", model[0], bits=0)
    (tmp_path / "out").mkdir()
    safetensors.write(checkpoint, plain, tmp_path / "out",
                      Variant(recipe="none", format="safetensors", runtime="transformers", dtype="float32"))
    assert differing(safetensors, tmp_path / "out", checkpoint, plain) == []
    tokens = tokens_of(checkpoint)
    found = open_runtime("transformers", tmp_path / "out", 1).logprobs(tokens)
    assert np.array_equal(found, torch_logprobs(torch_model(checkpoint, plain), tokens))


@pytest.mark.parametrize("recipe", [None, {"method": "gptq", "bits": 4, "curvature": True}], ids=["float32", "int4"])
def test_onnx_agrees_with_torch(model, recipe, tmp_path):
    checkpoint = model[0]
    made = quantized(model, tmp_path / "q", **recipe) if recipe else rounded(tmp_path / "q", checkpoint, bits=0)
    (tmp_path / "out").mkdir()
    onnx.write(checkpoint, made, tmp_path / "out", Variant(recipe="none", format="onnx", runtime="onnxruntime"))
    assert differing(onnx, tmp_path / "out", checkpoint, made) == []
    tokens, runtime = tokens_of(checkpoint, 2, 40), open_runtime("onnxruntime", tmp_path / "out", 1)
    whole = torch_model(checkpoint, made)
    assert np.abs(runtime.logprobs(tokens) - torch_logprobs(whole, tokens)).max() < 1e-3
    assert runtime.generate(tokens[0].tolist(), 8, set()) == torch_greedy(whole, tokens[:1], 8)


def test_gguf_agrees_with_torch(model, tmp_path):
    checkpoint, plain = model[0], rounded(tmp_path / "none", model[0], bits=0)
    (tmp_path / "out").mkdir()
    variant = Variant(recipe="none", format="gguf", runtime="llama.cpp", dtype="float32")
    if checkpoint.config["model_type"] == "qwen3_moe":
        with pytest.raises(StageError, match="experts in all 2 blocks, found them in 1|norm_topk_prob True") as caught:
            gguf.write(checkpoint, plain, tmp_path / "out", variant)
        assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE and not list((tmp_path / "out").iterdir())
        return
    gguf.write(checkpoint, plain, tmp_path / "out", variant)
    assert differing(gguf, tmp_path / "out", checkpoint, plain) == []
    tokens, runtime = tokens_of(checkpoint, 2, 40), open_runtime("llama.cpp", tmp_path / "out", 1)
    assert np.abs(runtime.logprobs(tokens) - torch_logprobs(torch_model(checkpoint, plain), tokens)).max() < 1e-3


@pytest.mark.parametrize(("config", "answer"), [
    ({"model_type": "gemma2"}, True), ({"model_type": "llama"}, False), ({"model_type": "llama", "tie_word_embeddings": True}, True),
    ({"model_type": "gemma3_text", "tie_word_embeddings": False}, False), ({}, False)])
def test_a_head_is_tied_as_transformers_takes_it(config, answer):
    assert tied(config) is answer
