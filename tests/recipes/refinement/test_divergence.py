"""The divergence and its gradient are those of autograd through the whole vocabulary."""

import pytest
import torch
from torch.nn import functional

from quantline.model.output_head import OutputHead
from quantline.recipes.refinement import divergence
from quantline.recipes.refinement.divergence import summed_divergence

EPSILON = 1e-5


@pytest.mark.parametrize("at_once", [1 << 24, 2 * 11])
@pytest.mark.parametrize(
    ("scale", "softcap", "biased"),
    [(1.0, None, False), (0.5, None, True), (1.0, 2.0, False), (0.5, 2.0, True)],
)
def test_summed_divergence_is_autograds(scale, softcap, biased, at_once, monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK_VALUES", at_once)
    generator = torch.Generator().manual_seed(1)
    hidden, expected = torch.randn(2, 7, 5, generator=generator)
    bias = torch.randn(11, generator=generator) if biased else None
    weights = torch.randn(2, 11, 5, generator=generator)
    heads = [OutputHead(weight, scale, softcap, bias) for weight in weights]

    def logprobs(states, head):
        logits = functional.linear(states, head.weight, bias) * scale
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        return torch.log_softmax(logits, -1)

    leaf = hidden.clone().requires_grad_(True)
    wanted = functional.kl_div(
        logprobs(leaf, heads[0]), logprobs(expected, heads[1]), reduction="sum", log_target=True
    )
    wanted.backward()
    total, gradient = summed_divergence(hidden, expected, *heads)
    assert total == pytest.approx(float(wanted.detach()), rel=EPSILON)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=EPSILON)


def test_summed_divergence_from_itself_is_nothing():
    hidden = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    head = OutputHead(torch.randn(11, 5, generator=torch.Generator().manual_seed(1)))
    total, gradient = summed_divergence(hidden, hidden, head, head)
    assert total == 0 and not gradient.any()
