"""The output factors are those of gradients through the whole model, and of labels that the model itself draws."""

import numpy as np
import pytest
import torch
from rounded import tokens_of
from sklearn.covariance import ledoit_wolf
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from quantline.calibration import output_moments as gradients
from quantline.model import block_runner as blocks
from quantline.model.architecture import architecture
from quantline.model.block_runner import BlockRun
from quantline.calibration.output_moments import (
    Head,
    OutputMoments,
    backward,
    first_gradients,
    head_of,
    output_gradient,
    shrunk,
    widest,
)
from quantline.model.checkpoint import Checkpoint
from quantline.model.activation_store import StoredStates


@pytest.mark.parametrize(("scale", "softcap", "biased"), [(1.0, None, False), (0.5, None, True), (1.0, 2.0, False), (0.5, 2.0, True)])
def test_the_first_gradient_is_autograds(scale, softcap, biased):
    draw = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(7, 5, generator=draw).requires_grad_(True), torch.randn(11, 5, generator=draw)
    bias = torch.randn(11, generator=draw) if biased else None
    logits = torch.nn.functional.linear(hidden, head, bias) * scale
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    points = torch.rand(7, 1, generator=torch.Generator().manual_seed(3))
    labels = (torch.softmax(logits.detach(), -1).cumsum(-1) < points).sum(-1, keepdim=True)
    torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="sum").backward()
    found = output_gradient(hidden.detach(), Head(head, scale, softcap, bias), torch.Generator().manual_seed(3))
    assert torch.allclose(found, hidden.grad, atol=1e-5)


def test_with_the_models_own_labels_the_gradient_is_zero_on_average():
    draw = torch.Generator().manual_seed(2)
    hidden, head = torch.randn(1, 4, generator=draw), torch.randn(6, 4, generator=draw)
    found = output_gradient(hidden.expand(40_000, 4).contiguous(), Head(head), torch.Generator().manual_seed(0))
    assert found.mean(0).abs().max() < 0.03 < found.abs().mean()


def test_a_block_of_the_factor_divides_the_outputs():
    assert [widest(*pair) for pair in ((768, 512), (256, 512), (352, 128), (7, 3))] == [384, 256, 88, 1]


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_the_shrinkage_is_ledoit_and_wolfs(spread):
    """Against scikit-learn's, on rows of which few have nearly all of the length, and on rows that are alike."""
    draw = torch.Generator().manual_seed(5)
    rows = torch.randn(2, 300, 20, generator=draw, dtype=torch.float64) * torch.logspace(-1, 1, 20, dtype=torch.float64)
    rows *= (spread * torch.randn(2, 300, 1, generator=draw, dtype=torch.float64)).exp()
    found, shares = shrunk(rows.transpose(1, 2) @ rows, rows.square().sum(-1).square().sum(1), 300)
    for block, factors, share in zip(rows, found, shares, strict=True):
        wanted, intensity = ledoit_wolf(block.numpy(), assume_centered=True)
        np.testing.assert_allclose(factors.numpy(), wanted, rtol=1e-8, atol=1e-12 * wanted.max())
        assert float(share) == pytest.approx(intensity) and (share > 0.3) == (spread > 0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox", "gpt2", "mixtral"])
def test_factors_are_those_of_the_whole_model(family, make_model, tmp_path, monkeypatch):
    def first_token(hidden, head, draw):
        """The gradient for the label 1, so that no draw stands between the two."""
        logits, slope = torch.nn.functional.linear(hidden, head.weight, head.bias), 1
        if head.softcap:
            bent = torch.tanh(logits / head.softcap)
            logits, slope = bent * head.softcap, 1 - bent**2
        probability = torch.softmax(logits, -1)
        probability[:, 1] -= 1
        return (probability * slope) @ head.weight

    monkeypatch.setattr(gradients, "output_gradient", first_token)
    sizes = {"mixtral": {"num_local_experts": 3}, "phi": {"num_key_value_heads": 4, "tie_word_embeddings": False}}.get(family, {})
    folder = make_model(tmp_path / "model", family, hidden_size=64, intermediate_size=96, num_hidden_layers=3, **sizes)
    checkpoint, limit = Checkpoint(folder), 48
    tokens = tokens_of(checkpoint, 5, 20)
    monkeypatch.setattr(blocks, "BATCH_TOKENS", 40)  # batches of 2, 2 and 1
    found, run = {}, BlockRun(checkpoint, tokens)
    states = StoredStates(tmp_path / "states", 4, run.hidden)
    states.put(0, run.hidden)
    run.forward("test", after=lambda block: states.put(block + 1, run.hidden))
    first = first_gradients(run, run.hidden, head_of(checkpoint), 0)
    backward(run, states, first, OutputMoments(limit, lambda name, factors, shrinkage: found.update({name: (factors, shrinkage)})), 2)

    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head":
            module.register_full_backward_hook(lambda _, into, out, name=name: seen.__setitem__(name, out[0]))
    logits = model(torch.from_numpy(tokens).long()).logits
    torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), torch.ones(100, dtype=torch.long),
                                      reduction="sum").backward()
    assert sorted(found) == sorted(architecture(checkpoint).linears())
    assert sorted(seen) == sorted(name for name in found if ".experts." not in name)  # transformers' experts are fused
    for name, gradient in seen.items():
        rows = gradient.reshape(100, -1).double().numpy()
        whole, size = rows.T @ rows / 100, widest(rows.shape[1], limit)
        for number, (block, share) in enumerate(zip(*found[name], strict=True)):
            part = whole[number * size:(number + 1) * size, number * size:(number + 1) * size]
            wanted = (1 - share) * part + share * part.trace() / size * np.eye(size)
            np.testing.assert_allclose(block, wanted, rtol=1e-3, atol=1e-5 * np.abs(whole).max())
            assert 0 <= share < 1


def test_the_same_seed_draws_the_same_labels():
    hidden, head = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.randn(6, 4)
    one, same, other = (output_gradient(hidden, Head(head), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
