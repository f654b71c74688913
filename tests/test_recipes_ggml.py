"""The scales that kquant-curvature folds into a block: the function stays, in every kind of block and in the file."""

import numpy as np
import pytest
import torch
from rounded import tokens_of, torch_logprobs, torch_model
from test_formats_gguf import GEMMA, variant

from quantline.model.architecture import architecture
from quantline.quantized.store import Quantized, QuantizedWriter
from quantline.calibration.collect import ABOUT, Moments, collect
from quantline.model.checkpoint import Checkpoint
from quantline.formats.gguf import container as gguf
from quantline.methods.ggml import quantize as kquant
from quantline.methods.integer.curvature import divergence
from quantline.methods.ggml.block_types import dequantize
from quantline.methods.integer.grid import output_error
from quantline.recipes import ggml
from quantline.recipes.context import Work
from quantline.runtimes.runtime import open_runtime
from quantline.config.recipes import KQuantCurvature
from quantline.files import write_json

FAMILIES = {
    "llama with heads of their own": ("llama", {"num_key_value_heads": 4}), "llama with biases": ("llama", {"attention_bias": True}),
    "gemma2": ("gemma2", GEMMA), "phi3": ("phi3", {"tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {"tie_word_embeddings": False}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "tie_word_embeddings": False}),
}


def calibrated(checkpoint: Checkpoint, folder) -> Moments:
    tokens = tokens_of(checkpoint, 8, 64)
    folder.mkdir()
    layers = collect(checkpoint, tokens, folder, 0)
    write_json(folder / ABOUT, {"layers": layers, "curvature": True, "tokens": int(tokens.size), "seed": 0,
                                "text_sha256": "0", "sequences": 8, "length": 64})
    return Moments(folder)


def rounded(source, folder, **recipe) -> tuple[Checkpoint, Quantized, dict, list, Moments]:
    """A model rounded by kquant-curvature, block by block: what is written, and the reports of its tensors and transforms."""
    checkpoint, reports, transforms = Checkpoint(source), {}, []
    moments = calibrated(checkpoint, folder / "moments")
    (folder / "quantized").mkdir()
    work = Work(KQuantCurvature(method="kquant-curvature", **recipe), checkpoint, architecture(checkpoint), moments,
                QuantizedWriter(folder / "quantized"))
    for layer in [*range(work.facts.layers), None]:
        done = ggml.round_block(work, layer)
        work.writer.close_part("rest" if layer is None else f"block-{layer:03d}", done)
        reports |= done["layers"]
        transforms += done["transforms"]
    work.writer.close({"recipe": {"name": "curved", "mix": recipe["mix"]}, "transforms": transforms, "calibration": {},
                       "tensors": reports})
    return checkpoint, Quantized(folder / "quantized"), reports, transforms, moments


def as_floats(checkpoint: Checkpoint, quantized: Quantized, folder) -> Quantized:
    """The values of the blocks as overrides, which torch_model takes."""
    folder.mkdir()
    writer = QuantizedWriter(folder)
    for name in quantized.blocks_names:
        kind, data, shape = quantized.blocks(name)
        writer.add_override(name, (data.view(np.float32) if kind == "F32" else dequantize(data, kind)).reshape(shape))
    writer.close({})
    return Quantized(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_scales_leave_the_function_as_it_is(name, tmp_path, make_model):
    """With eight bits nothing but a wrong folding could move the logits."""
    family, sizes = FAMILIES[name]
    made = rounded(make_model(tmp_path / "model", family, **sizes), tmp_path, mix="Q8_0", rounds=0)
    checkpoint, quantized, _, transforms, _ = made
    into = {one["into"] for one in transforms if one["reach"] > 0}
    assert into and all(one["step"] == "fold_scales" for one in transforms)
    tensors = [f"{one}.{part}" for one in into for part in ("weight", "bias") if f"{one}.{part}" in checkpoint.files]
    floats = as_floats(checkpoint, quantized, tmp_path / "floats")
    assert max(np.abs(floats.override(one) - checkpoint.tensor(one)).max() for one in tensors) > 0.05
    tokens = tokens_of(checkpoint)
    plain = torch_logprobs(torch_model(checkpoint, nothing(tmp_path / "nothing")), tokens)
    assert np.abs(torch_logprobs(torch_model(checkpoint, floats), tokens) - plain).mean() < 0.03


def nothing(folder) -> Quantized:
    """A model in which nothing is rounded."""
    folder.mkdir()
    QuantizedWriter(folder).close({})
    return Quantized(folder)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_file_holds_the_norms_with_the_scales(family, tmp_path, make_model):
    source = make_model(tmp_path / "model", family, **(GEMMA if family == "gemma2" else {}))
    checkpoint, quantized, _, transforms, _ = rounded(source, tmp_path, mix="Q8_0", rounds=0)
    assert any(one["reach"] > 0 for one in transforms)
    (tmp_path / "bundle").mkdir()
    gguf.write(checkpoint, quantized, tmp_path / "bundle", variant())
    floats, held = as_floats(checkpoint, quantized, tmp_path / "floats"), gguf.read_back(tmp_path / "bundle", checkpoint)
    for name, tensor in held.items():
        assert np.array_equal(tensor.dequantize(), gguf.expected(checkpoint, quantized, name, tensor.type)), name
        assert np.allclose(tensor.dequantize(), floats.override(name), atol=1e-6), name
    tokens = tokens_of(checkpoint)
    found = open_runtime("llama.cpp", tmp_path / "bundle", 1).logprobs(tokens)
    plain = torch_logprobs(torch_model(checkpoint, nothing(tmp_path / "nothing")), tokens)
    assert np.abs(found - plain).mean() < 0.05  # attention rounds its inputs


def test_what_is_told_is_of_the_weights_as_they_act(tmp_path, make_model):
    """Error and divergence in the source's own inputs and outputs, of the stored blocks with the scales taken out again."""
    source = make_model(tmp_path / "model", num_hidden_layers=1)
    checkpoint, quantized, reports, transforms, moments = rounded(source, tmp_path, mix="Q3_K_M", rounds=1)
    floats, prefix = as_floats(checkpoint, quantized, tmp_path / "floats"), "model.layers.0."
    assert [one["into"].removeprefix(prefix) for one in transforms] == [
        "input_layernorm", "post_attention_layernorm", "mlp.up_proj"]
    norm = {one: checkpoint.tensor(f"{prefix}{one}.weight") / floats.override(f"{prefix}{one}.weight")
            for one in ("input_layernorm", "post_attention_layernorm")}
    for module, scales in (("self_attn.q_proj", norm["input_layernorm"]), ("mlp.gate_proj", norm["post_attention_layernorm"]),
                           ("self_attn.o_proj", np.float32(1))):
        name = f"{prefix}{module}"
        weight, moment, factors = (torch.from_numpy(one) for one in (
            checkpoint.tensor(f"{name}.weight"), moments.moment(name), moments.factors(name)))
        stored = torch.from_numpy(floats.override(f"{name}.weight") / scales)
        about = reports[f"{name}.weight"]
        assert about["divergence"] == pytest.approx(divergence(stored - weight, moment, factors), rel=1e-3)
        assert about["error"] == pytest.approx(output_error(weight, stored, moment), rel=1e-3)
        plain = torch.from_numpy(dequantize(kquant.quantize(weight.numpy(), about["actual"], moment.diagonal().numpy()),
                                            about["actual"]))
        assert about["ggml_divergence"] == pytest.approx(divergence(plain - weight, moment, factors), rel=1e-3)


@pytest.mark.parametrize(("kept", "left"), [
    ("attn_k", {"post_attention_layernorm", "mlp.up_proj"}), ("ffn_up", {"input_layernorm"}),
    ("ffn_down", {"input_layernorm", "post_attention_layernorm"})])
def test_what_is_kept_in_floats_is_the_sources(kept, left, tmp_path, make_model):
    source = make_model(tmp_path / "model", num_hidden_layers=1)
    checkpoint, quantized, reports, transforms, _ = rounded(source, tmp_path, mix="Q4_K_M", rounds=0, overrides={kept: "F32"})
    assert {one["into"].removeprefix("model.layers.0.") for one in transforms} == left
    floats = [name for name, about in reports.items() if about["actual"] == "F32" and len(about["shape"]) == 2]
    assert len(floats) == 1
    _, data, shape = quantized.blocks(floats[0])
    assert np.array_equal(data.view(np.float32).reshape(shape), checkpoint.tensor(floats[0]))


def test_without_scaling_norms_are_the_sources(tmp_path, make_model):
    source = make_model(tmp_path / "model", num_hidden_layers=1)
    checkpoint, quantized, _, transforms, _ = rounded(source, tmp_path, mix="Q4_K_M", rounds=0, scaling=False)
    assert transforms == []
    for name in (name for name in checkpoint.names if "norm" in name):
        assert np.array_equal(quantized.blocks(name)[1].view(np.float32).reshape(-1), checkpoint.tensor(name))
