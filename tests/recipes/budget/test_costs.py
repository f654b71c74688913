"""What rounding a tensor is predicted to cost, against sums over weights and against the model."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from quantline.calibration.embedding_and_head import embedding_fisher, final_states
from quantline.calibration.store import CalibrationStore
from quantline.errors import Failure
from quantline.methods.integer.grid import Grid
from quantline.methods.integer.round_to_nearest import round_to_nearest
from quantline.model.checkpoint import Checkpoint
from quantline.recipes.budget import costs as costs_module
from quantline.recipes.budget.costs import Costs, has_cost
from quantline.run.lineage import lineage_file
from tests.helpers.budget import assert_refused, context_in
from tests.helpers.ggml_recipes import calibrated_model, context_of, kquant
from tests.helpers.quantized import torch_logprobs, torch_model


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape).astype(np.float32) * 0.01


def cost_of(costs: Costs, name: str, weight: np.ndarray, stored: np.ndarray) -> float:
    return costs.of(name, torch.from_numpy(weight))(torch.from_numpy(stored))


@pytest.mark.parametrize("gradients", [True, False])
def test_cost_of_a_layer_is_the_sum_over_weights(ready, gradients):
    ctx = context_in(ready.root / "artifacts", gradients)
    layer = "model.layers.1.mlp.down_proj"
    weight = ctx.source.tensor(f"{layer}.weight")
    change = noise(weight.shape)
    hessian = ctx.moments(layer).astype(float)
    cost = cost_of(Costs(ctx), f"{layer}.weight", weight, weight + change)
    if gradients:
        factor = CalibrationStore("artifacts/calibration").fisher_out(layer)[0].astype(float)
        expected = 0.5 * np.einsum("ab,bi,ij,aj->", factor, change, hessian, change, optimize=True)
    else:
        error = np.einsum("ai,ij,aj->", change, hessian, change)
        expected = error / np.einsum("ai,ij,aj->", weight, hessian, weight)
    assert cost == pytest.approx(expected, rel=1e-4)
    assert cost > 0


def divergence_of_logits(logits: np.ndarray, rounded: np.ndarray) -> float:
    """Return the mean KL divergence of logits [tokens, vocabulary]."""

    def probabilities(values: np.ndarray) -> np.ndarray:
        powers = np.exp(values - values.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    before = probabilities(logits)
    after = probabilities(rounded)
    return (before * np.log(before / after)).sum(1).mean()


def test_cost_of_a_tied_embedding_is_that_of_embedding_and_head(ready):
    artifacts = ready.root / "artifacts"
    ctx = context_in(artifacts)
    name = ctx.arch.embedding
    weight = ctx.source.tensor(name)
    change = noise(weight.shape)
    stored = load_file("artifacts/calibration/embedding.safetensors")
    assert stored["diagonal"].shape == (1, 256)
    tokens = load_file("artifacts/calibration/tokens.safetensors")["tokens"].reshape(-1)
    counts = np.bincount(tokens, minlength=len(weight)) + 1
    frequencies = counts / (len(tokens) + len(weight))
    factor = embedding_fisher(artifacts / "calibration")[0].astype(float)
    of_embedding = 0.0
    for frequency, row in zip(frequencies, change, strict=True):
        of_embedding += 0.5 * frequency * row @ factor @ row
    states = final_states(artifacts / "calibration").astype(float)
    assert states.shape == (512, 256)
    of_head = divergence_of_logits(states @ weight.T, states @ (weight + change).T)
    cost = cost_of(Costs(ctx), name, weight, weight + change)
    assert cost == pytest.approx(of_embedding + of_head, rel=1e-3)
    assert min(of_embedding, of_head) > 0


def test_cost_of_a_head_counts_its_bias(tmp_path, make_model):
    source = make_model(
        tmp_path / "model",
        "phi",
        num_hidden_layers=1,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    model = calibrated_model(tmp_path, source, 4, 32, gradients=True)
    ctx = context_of(kquant("Q4_K_M"), model.source, model.calibration, tmp_path)
    weight = model.source.tensor(ctx.arch.head)
    bias = model.source.tensor(ctx.arch.head_bias)
    assert np.abs(bias).max() > 0.1
    stored = weight + noise(weight.shape)
    states = final_states(model.calibration.folder).astype(float)
    expected = divergence_of_logits(states @ weight.T + bias, states @ stored.T + bias)
    without_bias = divergence_of_logits(states @ weight.T, states @ stored.T)
    assert abs(without_bias / expected - 1) > 0.01
    cost = cost_of(Costs(ctx), ctx.arch.head, weight, stored)
    assert cost == pytest.approx(expected, rel=1e-3)


def test_cost_of_a_head_does_not_depend_on_chunks(ready, monkeypatch):
    ctx = context_in(ready.root / "artifacts")
    name = "model.embed_tokens.weight"
    weight = ctx.source.tensor(name)
    at_once = cost_of(Costs(ctx), name, weight, weight * np.float32(1.01))
    monkeypatch.setattr(costs_module, "CHUNK_VALUES", 5000)
    in_chunks = cost_of(Costs(ctx), name, weight, weight * np.float32(1.01))
    assert in_chunks == pytest.approx(at_once, rel=1e-4)


def store_of(linears: dict[str, Any]) -> Any:
    """Return something that torch_model reads like a QuantizedModel."""
    return SimpleNamespace(linears=list(linears), overrides=[], linear=linears.__getitem__)


def test_costs_are_what_the_model_really_loses(ready):
    """One rounded layer after another, against the rounded model's divergence on the same text."""
    ctx = context_in(ready.root / "artifacts")
    tokens = load_file("artifacts/calibration/tokens.safetensors")["tokens"]
    logprobs = torch_logprobs(torch_model(ctx.source, store_of({})), tokens)
    predicted = []
    measured = []
    for layer in ("0.self_attn.v_proj", "0.mlp.down_proj", "1.mlp.up_proj"):
        name = f"model.layers.{layer}"
        weight = ctx.source.tensor(f"{name}.weight")
        linear = round_to_nearest(torch.from_numpy(weight), Grid(4, 128, False))
        predicted.append(cost_of(Costs(ctx), f"{name}.weight", weight, linear.dequantize()))
        rounded = torch_logprobs(torch_model(ctx.source, store_of({name: linear})), tokens)
        measured.append(float((np.exp(logprobs) * (logprobs - rounded)).sum(-1).mean()))
    assert np.array(predicted) == pytest.approx(np.array(measured), rel=0.5)


def test_has_cost_is_true_of_embedding_head_and_calibrated_layers(ready):
    ctx = context_in(ready.root / "artifacts")
    assert has_cost(ctx, "model.embed_tokens.weight")
    assert has_cost(ctx, "model.layers.0.mlp.up_proj.weight")
    assert not has_cost(ctx, "model.layers.0.input_layernorm.weight")
    costed = [name for name in Checkpoint("artifacts/model").names if has_cost(ctx, name)]
    assert len(costed) == 15


def test_costs_refuse_a_calibration_from_before_there_were_budgets(ready, capsys):
    (ready.root / "artifacts/calibration/embedding.safetensors").unlink()
    lineage_file("calibration").unlink()  # which knows the file as it was
    words = "run `dvc repro calibrate`"
    assert_refused(ready, capsys, "q4_k_m-budget", Failure.MISSING_FILE, words)


def test_costs_that_are_not_finite_are_refused(ready, capsys):
    path = ready.root / "artifacts/calibration/final.safetensors"
    peak = np.full(256, np.nan, np.float32)
    save_file(load_file(path) | {"peak": peak}, path)
    lineage_file("calibration").unlink()  # which knows the file as it was
    words = "a finite cost of rounding model.embed_tokens.weight"
    assert_refused(ready, capsys, "q4_k_m-budget", Failure.NON_FINITE, words)
