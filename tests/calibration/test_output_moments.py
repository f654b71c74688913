"""G is of gradients through the whole model, and of labels that the model itself draws."""

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from torch.nn import functional

from quantline.calibration import output_moments
from quantline.calibration.output_moments import (
    OutputMoments,
    backward,
    last_block_gradients,
    sampled_gradient,
    shrink,
    widest_divisor,
)
from quantline.model import block_runner
from quantline.model.activation_store import ActivationStore
from quantline.model.block_runner import BlockRun
from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.model.output_head import OutputHead
from tests.helpers.gradients import gradient_for_label_one, seen_in_transformers
from tests.helpers.quantized import tokens_of


@pytest.mark.parametrize(
    ("scale", "softcap", "biased"),
    [(1.0, None, False), (0.5, None, True), (1.0, 2.0, False), (0.5, 2.0, True)],
)
def test_sampled_gradient_is_autograds(scale, softcap, biased):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 5, generator=generator).requires_grad_(True)
    weight = torch.randn(11, 5, generator=generator)
    bias = torch.randn(11, generator=generator) if biased else None
    logits = functional.linear(hidden, weight, bias) * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    points = torch.rand(7, 1, generator=torch.Generator().manual_seed(3))
    cumulated = torch.softmax(logits.detach(), -1).cumsum(-1)
    labels = (cumulated < points).sum(-1, keepdim=True)
    functional.cross_entropy(logits, labels[:, 0], reduction="sum").backward()
    head = OutputHead(weight, scale, softcap, bias)
    gradient = sampled_gradient(hidden.detach(), head, torch.Generator().manual_seed(3))
    assert torch.allclose(gradient, hidden.grad, atol=1e-5)


def test_sampled_gradient_is_zero_on_average():
    """Because the labels are drawn from the model's own distribution."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(1, 4, generator=generator).expand(40_000, 4).contiguous()
    head = OutputHead(torch.randn(6, 4, generator=generator))
    gradient = sampled_gradient(hidden, head, torch.Generator().manual_seed(0))
    assert gradient.mean(0).abs().max() < 0.03 < gradient.abs().mean()


def test_sampled_gradient_draws_the_same_labels_with_the_same_seed(monkeypatch):
    hidden = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    head = OutputHead(torch.randn(6, 4))

    def with_seed(seed: int) -> torch.Tensor:
        return sampled_gradient(hidden, head, torch.Generator().manual_seed(seed))

    first = with_seed(1)
    assert torch.equal(first, with_seed(1))
    assert not torch.equal(first, with_seed(2))
    monkeypatch.setattr(output_moments, "CHUNK_VALUES", 2 * len(head))  # two tokens at once
    assert torch.allclose(first, with_seed(1), atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "limit", "size"), [(768, 512, 384), (256, 512, 256), (352, 128, 88), (7, 3, 1)]
)
def test_widest_divisor_divides_the_outputs(rows, limit, size):
    assert widest_divisor(rows, limit) == size


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_shrink_is_ledoit_and_wolfs(spread):
    """Against scikit-learn's.

    On rows of which few have nearly all of the length, and on rows that are alike.
    """
    generator = torch.Generator().manual_seed(5)
    scales = torch.logspace(-1, 1, 20, dtype=torch.float64)
    rows = torch.randn(2, 300, 20, generator=generator, dtype=torch.float64) * scales
    lengths = torch.randn(2, 300, 1, generator=generator, dtype=torch.float64)
    rows *= (spread * lengths).exp()
    fourth_powers = rows.square().sum(-1).square().sum(1)
    shrunk, intensities = shrink(rows.transpose(1, 2) @ rows, fourth_powers, 300)
    for block, fisher_out, intensity in zip(rows, shrunk, intensities, strict=True):
        expected, expected_intensity = ledoit_wolf(block.numpy(), assume_centered=True)
        tolerance = 1e-12 * expected.max()
        np.testing.assert_allclose(fisher_out.numpy(), expected, rtol=1e-8, atol=tolerance)
        assert float(intensity) == pytest.approx(expected_intensity)
        assert (intensity > 0.3) == (spread > 0)


SIZES = {
    "mixtral": {"num_local_experts": 3},
    "phi": {"num_key_value_heads": 4, "tie_word_embeddings": False},
}


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox", "gpt2", "mixtral"],
)
def test_backward_gives_the_moments_of_the_gradients_in_transformers(
    family, make_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(output_moments, "sampled_gradient", gradient_for_label_one)
    monkeypatch.setattr(block_runner, "BATCH_TOKENS", 40)  # batches of 2, 2 and 1
    limit = 48
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    folder = make_model(tmp_path / "model", family, **sizes, **SIZES.get(family, {}))
    checkpoint = Checkpoint(folder)
    tokens = tokens_of(checkpoint, 5, 20)
    run = BlockRun(checkpoint, tokens)
    states = ActivationStore(tmp_path / "states", 4, run.hidden)
    states.put(0, run.hidden)
    run.forward("test", after=lambda block: states.put(block + 1, run.hidden))
    head = OutputHead.of(checkpoint).to_torch(device())
    gradients = last_block_gradients(run, run.hidden, head, 0)
    statistics = {}

    def keep(layer, fisher_out, shrinkage):
        statistics[layer] = (fisher_out, shrinkage)

    backward(run, states, gradients, OutputMoments(limit, keep), 2)

    expected = {name: seen.gradients for name, seen in seen_in_transformers(folder, tokens).items()}
    assert sorted(statistics) == sorted(checkpoint.arch.linears())
    # transformers' experts are fused.
    assert sorted(expected) == sorted(name for name in statistics if ".experts." not in name)
    for name, rows in expected.items():
        full = rows.T @ rows / tokens.size
        size = widest_divisor(rows.shape[1], limit)
        for number, (block, intensity) in enumerate(zip(*statistics[name], strict=True)):
            span = slice(number * size, (number + 1) * size)
            part = full[span, span]
            level = part.trace() / size
            shrunk = (1 - intensity) * part + intensity * level * np.eye(size)
            tolerance = 1e-5 * np.abs(full).max()
            np.testing.assert_allclose(block, shrunk, rtol=1e-3, atol=tolerance)
            assert 0 <= intensity < 1
