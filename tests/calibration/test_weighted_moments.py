"""Tokens count by their gradients in the moments of inputs."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from quantline.calibration import output_moments
from quantline.calibration.block_files import WEIGHTED, block_file
from quantline.calibration.collect import collect_statistics
from quantline.calibration.packing import unpack
from quantline.calibration.weighted_moments import WeightedMoments
from quantline.model import block_runner
from quantline.model.checkpoint import Checkpoint
from tests.helpers.gradients import gradient_for_label_one, seen_in_transformers
from tests.helpers.quantized import tokens_of


def collected(checkpoint, folder, tokens) -> tuple[dict, dict]:
    """Return the layers of a weighted calibration, and the tensors of the weighted moments."""
    folder.mkdir()
    layers = collect_statistics(checkpoint, tokens, folder, seed=0, weighted=True)
    tensors = {}
    for block in range(checkpoint.arch.layers):
        tensors |= load_file(folder / block_file(WEIGHTED, block))
    return layers, tensors


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3_text"])
def test_moments_are_those_of_inputs_and_gradients_in_transformers(
    family, make_model, tmp_path, monkeypatch
):
    """Each token counts by the gradients of all readers of its input, in the unit of the batch."""
    monkeypatch.setattr(output_moments, "sampled_gradient", gradient_for_label_one)
    monkeypatch.setattr(block_runner, "BATCH_TOKENS", 40)  # batches of 2, 2 and 1
    folder = make_model(tmp_path / "model", family, num_hidden_layers=3)
    checkpoint = Checkpoint(folder)
    tokens = tokens_of(checkpoint, 5, 20)
    layers, tensors = collected(checkpoint, tmp_path / "statistics", tokens)
    seen = seen_in_transformers(folder, tokens)
    assert sorted(seen) == sorted(layers)
    for key in {entry["moments"] for entry in layers.values()}:
        readers = [name for name, entry in layers.items() if entry["moments"] == key]
        inputs = seen[key].inputs
        weights = np.zeros(tokens.size)
        for name in readers:
            sizes = np.linalg.norm(seen[name].gradients, axis=1)
            batches = np.split(sizes, [40, 80])
            weights += np.concatenate([batch / batch.mean() for batch in batches])
        products = (inputs * weights[:, None]).T @ inputs
        costs = weights**2 @ np.square(inputs).sum(1) / np.square(weights).sum()
        expected = products * costs / np.trace(products)
        found = unpack(tensors[f"{key}.diagonal"], tensors[f"{key}.triangle"])
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max())
        np.testing.assert_allclose(np.diagonal(found), np.diagonal(expected), rtol=1e-3)
        effective = np.square(weights.sum()) / np.square(weights).sum()
        assert tensors[f"{key}.effective_tokens"] == pytest.approx(effective, rel=1e-3)


def moments_of(rows, outputs, gradient) -> tuple[np.ndarray, float]:
    """Return what WeightedMoments makes of one layer that reads rows, and the effective tokens."""
    kept = {}

    def keep(layer, hessian, effective_tokens):
        kept[layer] = (hessian, float(effective_tokens[0]))

    linear = torch.nn.Linear(rows.shape[1], outputs, bias=False)
    linear.requires_grad_(False)
    moments = WeightedMoments(keep)
    with moments.watch({"layer": linear}):
        out = linear(rows)
        if gradient is not None:
            out.backward(gradient)
        moments.end_batch()
    return kept["layer"]


def test_tokens_without_a_gradient_do_not_count():
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    gradient = torch.ones(6, 3)
    gradient[::2] = 0
    hessian, effective = moments_of(rows, 3, gradient)
    used = rows.detach()[1::2].double()
    np.testing.assert_allclose(hessian, (used.T @ used / 3).numpy(), rtol=1e-5, atol=1e-6)
    assert effective == pytest.approx(3)


def test_tokens_count_alike_where_no_gradient_can_come():
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    hessian, effective = moments_of(rows, 3, None)
    exact = rows.double()
    np.testing.assert_allclose(hessian, (exact.T @ exact / 6).numpy(), rtol=1e-5, atol=1e-6)
    assert effective == pytest.approx(6)


def test_tokens_that_are_not_finite_are_left_out():
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    gradient = torch.ones(6, 3)
    gradient[2, 1] = torch.nan
    with torch.no_grad():
        rows[4, 0] = torch.inf
    hessian, effective = moments_of(rows, 3, gradient)
    used = rows.detach()[[0, 1, 3, 5]].double()
    np.testing.assert_allclose(hessian, (used.T @ used / 4).numpy(), rtol=1e-5, atol=1e-6)
    assert effective == pytest.approx(4)


def test_where_no_gradient_comes_there_are_no_moments():
    rows = torch.ones(2, 4).requires_grad_(True)
    hessian, effective = moments_of(rows, 3, torch.zeros(2, 3))
    assert not hessian.any()
    assert effective == 0
