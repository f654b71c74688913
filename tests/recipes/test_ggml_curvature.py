"""Curvature rounding in ggml's blocks: scales leave the function as it is, also in the file."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from quantline.config.recipes import SHRINKAGE
from quantline.formats.container import load_container
from quantline.methods.ggml.block_types import dequantize_blocks
from quantline.methods.ggml.quantize import quantize_blocks
from quantline.methods.integer.curvature import divergence
from quantline.methods.integer.output_error import output_error
from quantline.methods.method import load_method
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.store import QuantizedModel, QuantizedWriter
from quantline.recipes.ggml_curvature import CurvatureRounding
from quantline.runtimes.runtime import open_runtime
from tests.helpers.ggml_recipes import (
    CalibratedModel,
    calibrated_model,
    context_of,
    kquant_curvature,
    quantize_by,
    values_of,
    with_blocks_as_floats,
)
from tests.helpers.quantized import tokens_of, torch_logprobs, torch_model
from tests.helpers.variants import GEMMA, write_variant

PREFIX = "model.layers.0."
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with heads of their own": ("llama", {"num_key_value_heads": 4}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "gemma2": ("gemma2", GEMMA),
    "phi3": ("phi3", {"tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {"tie_word_embeddings": False}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "tie_word_embeddings": False}),
}
SLOW = ("llama with heads of their own", "phi3", "gpt_neox")


class Rounded(NamedTuple):
    """A model rounded by kquant-curvature.

    Attributes:
        model: With its calibration.
        quantized: The result.
        folded: The steps of the manifest that folded scales.
    """

    model: CalibratedModel
    quantized: QuantizedModel
    folded: list[dict[str, Any]]

    @property
    def reports(self) -> dict[str, dict[str, Any]]:
        return self.quantized.report["tensors"]


def round_by_curvature(folder: Path, model: CalibratedModel, mix: str, **options: Any) -> Rounded:
    recipe = kquant_curvature(mix, **options)
    quantized = quantize_by(recipe, model, folder / "quantized")
    transforms = quantized.report["transforms"]
    folded = [step for step in transforms if step["step"] == "fold_scales"]
    assert [step["step"] for step in transforms] == ["fold_scales"] * len(folded) + ["quantize"]
    return Rounded(model, quantized, folded)


def unquantized_logprobs(source: Checkpoint, folder: Path, tokens: np.ndarray) -> np.ndarray:
    folder.mkdir()
    QuantizedWriter(folder).close({})
    return torch_logprobs(torch_model(source, QuantizedModel(folder)), tokens)


@pytest.fixture(scope="module")
def with_eight_bits(tmp_path_factory, make_model) -> Callable[[str], Rounded]:
    """with_eight_bits(name) rounds a model of a family; no test may change it."""

    @cache
    def run(name: str) -> Rounded:
        family, sizes = FAMILIES[name]
        folder = tmp_path_factory.mktemp(family)
        source = make_model(folder / "model", family, **sizes)
        model = calibrated_model(folder, source, 8, 64, gradients=True)
        return round_by_curvature(folder, model, "Q8_0", rounds=0)

    return run


@pytest.fixture(scope="module")
def one_block(tmp_path_factory, make_model) -> CalibratedModel:
    """A llama of one block; no test may change it."""
    folder = tmp_path_factory.mktemp("one-block")
    source = make_model(folder / "model", num_hidden_layers=1)
    return calibrated_model(folder, source, 8, 64, gradients=True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAMILIES]
)
def test_search_input_scaling_leaves_the_function_as_it_is(name, tmp_path, with_eight_bits):
    """With eight bits nothing but a wrong folding could move the logits."""
    rounded = with_eight_bits(name)
    checkpoint = rounded.model.source
    modules = {step["into"] for step in rounded.folded if step["reach"] > 0}
    assert modules
    tensors = [f"{module}.{part}" for module in modules for part in ("weight", "bias")]
    changes = [
        np.abs(values_of(rounded.quantized, tensor) - checkpoint.tensor(tensor)).max()
        for tensor in tensors
        if tensor in checkpoint.files
    ]
    assert max(changes) > 0.05
    floats = with_blocks_as_floats(rounded.quantized, tmp_path / "floats")
    tokens = tokens_of(checkpoint)
    expected = unquantized_logprobs(checkpoint, tmp_path / "nothing", tokens)
    logprobs = torch_logprobs(torch_model(checkpoint, floats), tokens)
    assert np.abs(logprobs - expected).mean() < 0.03


@pytest.mark.parametrize("family", ["llama with biases", "gemma2"])
def test_gguf_file_holds_the_norms_with_the_scales(family, tmp_path, with_eight_bits):
    rounded = with_eight_bits(family)
    checkpoint = rounded.model.source
    assert any(step["reach"] > 0 for step in rounded.folded)
    bundle = tmp_path / "bundle"
    write_variant("gguf", bundle, checkpoint, rounded.quantized)
    container = load_container("gguf")
    stored = container.read_back(bundle, checkpoint)
    assert set(stored) == set(checkpoint.names)
    for name, tensor in stored.items():
        values = tensor.dequantize()
        expected = container.expected(checkpoint, rounded.quantized, name, tensor.type)
        assert np.array_equal(values, expected), name
        assert np.allclose(values, values_of(rounded.quantized, name), atol=1e-6), name
    tokens = tokens_of(checkpoint)
    logprobs = open_runtime("llama.cpp", bundle, 1).logprobs(tokens)
    expected = unquantized_logprobs(checkpoint, tmp_path / "nothing", tokens)
    assert np.abs(logprobs - expected).mean() < 0.05  # attention rounds its inputs


def test_reports_are_of_the_weights_as_they_act(tmp_path, one_block):
    """In the source's own inputs and outputs: of the blocks with the scales taken out again."""
    rounded = round_by_curvature(tmp_path, one_block, "Q3_K_M", rounds=1)
    checkpoint, calibration, _ = rounded.model
    modules = [step["into"].removeprefix(PREFIX) for step in rounded.folded]
    assert modules == ["input_layernorm", "post_attention_layernorm", "mlp.up_proj"]

    def scales_of(norm: str) -> np.ndarray:
        tensor = f"{PREFIX}{norm}.weight"
        return checkpoint.tensor(tensor) / values_of(rounded.quantized, tensor)

    scales_before = {
        "self_attn.q_proj": scales_of("input_layernorm"),
        "mlp.gate_proj": scales_of("post_attention_layernorm"),
        "self_attn.o_proj": np.float32(1),
    }
    for module, scales in scales_before.items():
        layer = f"{PREFIX}{module}"
        weight = torch.from_numpy(checkpoint.tensor(f"{layer}.weight"))
        hessian = torch.from_numpy(calibration.hessian(layer, SHRINKAGE))
        fisher_out = torch.from_numpy(calibration.fisher_out(layer))
        stored = torch.from_numpy(values_of(rounded.quantized, f"{layer}.weight") / scales)
        report = rounded.reports[f"{layer}.weight"]
        expected = divergence(stored - weight, hessian, fisher_out)
        assert report["divergence"] == pytest.approx(expected, rel=1e-3)
        assert report["error"] == pytest.approx(output_error(weight, stored, hessian), rel=1e-3)
        ggml_type = report["actual"]
        data = quantize_blocks(weight.numpy(), ggml_type, hessian.diagonal().numpy())
        plain = torch.from_numpy(dequantize_blocks(data, ggml_type))
        expected = divergence(plain - weight, hessian, fisher_out)
        assert report["ggml_divergence"] == pytest.approx(expected, rel=1e-3)
        expected = output_error(weight, plain, hessian)
        assert report["ggml_error"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("in_floats", "folded_into"),
    [
        ("attn_k", {"post_attention_layernorm", "mlp.up_proj"}),
        ("ffn_up", {"input_layernorm"}),
        ("ffn_down", {"input_layernorm", "post_attention_layernorm"}),
    ],
)
def test_search_input_scaling_leaves_what_stays_in_floats(
    in_floats, folded_into, tmp_path, one_block
):
    overrides = {in_floats: "F32"}
    rounded = round_by_curvature(tmp_path, one_block, "Q4_K_M", rounds=0, overrides=overrides)
    assert {step["into"].removeprefix(PREFIX) for step in rounded.folded} == folded_into
    floats = [
        name
        for name, report in rounded.reports.items()
        if report["actual"] == "F32" and len(report["shape"]) == 2
    ]
    assert len(floats) == 1
    values = values_of(rounded.quantized, floats[0])
    assert np.array_equal(values, rounded.model.source.tensor(floats[0]))


def test_quantize_block_without_scaling_leaves_the_norms(tmp_path, one_block):
    rounded = round_by_curvature(tmp_path, one_block, "Q4_K_M", rounds=0, scaling=False)
    assert rounded.folded == []
    checkpoint = rounded.model.source
    norms = [name for name in checkpoint.names if "norm" in name]
    assert len(norms) == 3
    for name in norms:
        assert np.array_equal(values_of(rounded.quantized, name), checkpoint.tensor(name))


class ShuffledRows(Checkpoint):
    """A checkpoint whose tensors have their rows in another order, as a converter makes them."""

    converted = True

    def row_order(self, name: str) -> np.ndarray:
        return np.random.default_rng(3).permutation(self.shape(name)[0])

    def raw(self, name: str) -> np.ndarray:
        return super().raw(name)[self.row_order(name)]


def test_curvature_rounding_of_a_converters_rows_is_that_of_the_checkpoints(tmp_path, one_block):
    recipe = kquant_curvature("Q4_K_M", rounds=1, scaling=False)
    shuffled = ShuffledRows(one_block.source.folder)
    name = f"{PREFIX}mlp.up_proj.weight"
    roundings = []
    for checkpoint in (one_block.source, shuffled):
        ctx = context_of(recipe, checkpoint, one_block.calibration, tmp_path)
        curvature = CurvatureRounding(ctx, load_method(ctx.recipe), 0)
        importance = one_block.calibration.hessian_diagonal(name.removesuffix(".weight"))
        roundings.append(curvature.quantize(name, "Q4_K", importance))
    (in_order, report), (data, report_of_shuffled) = roundings
    assert np.array_equal(data, in_order[shuffled.row_order(name)])
    assert not np.array_equal(data, in_order)
    assert report_of_shuffled == report


def test_curvature_rounding_of_a_converters_file_scales_nothing(tmp_path, one_block):
    recipe = kquant_curvature("Q4_K_M")
    ctx = context_of(recipe, ShuffledRows(one_block.source.folder), one_block.calibration, tmp_path)
    curvature = CurvatureRounding(ctx, load_method(ctx.recipe), 0)
    assert curvature.transforms == []
    assert curvature.replaced == {}
