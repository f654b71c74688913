"""Experts as layers of their own compute what transformers' fused ones do."""

import pytest
import torch
from torch import nn

from quantline.model.experts import Expert, Experts
from quantline.model.fused_experts import replacement_of

COUNT = 5
WIDTH = 16
INNER = 24
USED = 2
TOKENS = 40
NAMES = ("gate", "up", "down")


class Mixture:
    """Random fused parameters, and tokens with the experts that a router chose for them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.gate_up = torch.randn(COUNT, 2 * INNER, WIDTH, generator=generator) / 4
        self.down = torch.randn(COUNT, WIDTH, INNER, generator=generator) / 4
        self.hidden = torch.randn(TOKENS, WIDTH, generator=generator)
        choices = [torch.randperm(COUNT, generator=generator)[:USED] for _ in range(TOKENS)]
        self.chosen = torch.stack(choices)
        self.weights = torch.rand(TOKENS, USED, generator=generator)

    def fused(self) -> nn.Module:
        """Return transformers' module with these parameters."""
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_local_experts=COUNT,
            experts_implementation="eager",
        )
        theirs = MixtralExperts(config)
        with torch.no_grad():
            theirs.gate_up_proj.copy_(self.gate_up)
            theirs.down_proj.copy_(self.down)
        return theirs

    def split(self) -> Experts:
        """Return experts of their own with these parameters."""
        fused = self.fused()
        replacement = replacement_of(fused, NAMES)
        split = replacement.module
        for name, parameter in fused.named_parameters():
            for path, part in replacement.parts[name](parameter.detach()).items():
                split.get_parameter(path).data = part
        return split


@pytest.fixture
def mixture() -> Mixture:
    return Mixture()


@pytest.mark.parametrize("undercalibrated", [(), (1, 3), tuple(range(COUNT))])
def test_experts_have_the_values_and_gradients_of_transformers(undercalibrated, mixture):
    """Also where undercalibrated experts show all tokens to who listens."""
    theirs = mixture.fused()
    ours = mixture.split()
    ours.undercalibrated = frozenset(undercalibrated)
    results = []
    for module in (theirs, ours):
        states = mixture.hidden.clone().requires_grad_(True)
        weights = mixture.weights.clone().requires_grad_(True)
        out = module(states, mixture.chosen, weights)
        out.square().sum().backward()
        results.append((out, states.grad, weights.grad))
    for expected, actual in zip(*results, strict=True):
        assert torch.allclose(expected, actual, atol=1e-5)


def output_gradients(expert: Expert) -> dict[str, torch.Tensor]:
    """Return what will hold the gradients at the outputs of an expert's layers."""
    gradients = {}

    def listen(name):
        def after(module, args, out):
            out.register_hook(lambda gradient: gradients.__setitem__(name, gradient))

        return after

    for name in NAMES:
        getattr(expert, name).register_forward_hook(listen(name))
    return gradients


def test_experts_give_an_undercalibrated_one_the_gradients_of_all_tokens(mixture):
    ours = mixture.split()
    ours.undercalibrated = frozenset([2])
    alone = list(mixture.split())[2]
    gradients = output_gradients(list(ours)[2])
    expected = output_gradients(alone)
    slope = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(9))
    out = ours(mixture.hidden.clone().requires_grad_(True), mixture.chosen, mixture.weights)
    (out * slope).sum().backward()
    mean_weight = mixture.weights.mean(1, keepdim=True)
    (alone(mixture.hidden) * slope * mean_weight).sum().backward()
    assert sorted(gradients) == sorted(expected) == sorted(NAMES)
    for name, gradient in expected.items():
        assert len(gradients[name]) == TOKENS
        assert torch.allclose(gradients[name], gradient, atol=1e-5)
