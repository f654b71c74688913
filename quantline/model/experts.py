"""A mixture's experts as linear layers of their own, as checkpoints hold them; transformers fuses them into one parameter.

Calibration needs them apart: each has its own inputs, the tokens that the router sends to it. An expert that too few come to
is starved: its second moments would have hardly any rank. It is calibrated as if every token of the text came to it, with
the mean of the weights that the router gave to the experts that it chose. What the block computes stays the same.
"""

from collections.abc import Callable

import torch
from torch import nn

NEEDED = 4  # an expert is starved that sees fewer tokens than its widest input divided by this


class Expert(nn.Module):
    """down(activation(gate(x)) * up(x)); `names` are what the checkpoint calls the three."""

    def __init__(self, width: int, inner: int, names: list[str], activation: nn.Module) -> None:
        super().__init__()
        self.names, self.activation = names, activation
        for name, (into, out) in zip(names, ((width, inner), (width, inner), (inner, width)), strict=True):
            self.add_module(name, nn.Linear(into, out, bias=False))

    def forward(self, rows: torch.Tensor, run: Callable = nn.Module.__call__) -> torch.Tensor:
        """float [tokens, width] of the same shape. `run` is nn.Linear.forward where no hook may hear of it."""
        gate, up, down = (getattr(self, name) for name in self.names)
        return run(down, self.activation(run(gate, rows)) * run(up, rows))


class Experts(nn.ModuleList):
    """All experts of a block, in the place of transformers' module, whose function this is."""

    def __init__(self, count: int, width: int, inner: int, names: list[str], activation: nn.Module) -> None:
        super().__init__(Expert(width, inner, names, activation) for _ in range(count))
        self.needed = max(width, inner) / NEEDED
        self.seen = [0] * count  # tokens that came to each
        self.starved: frozenset[int] = frozenset()  # those that are calibrated on all tokens

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the experts make of hidden [tokens, width]; chosen int [tokens, used] says which, weights how much of each."""
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            starved = number in self.starved
            place, nth = torch.where(chosen == number)
            if torch.jit.is_tracing() or len(place):  # a trace has to hold every expert
                self.seen[number] += len(place)
                made = expert(hidden[place], nn.Linear.forward) if starved else expert(hidden[place])
                out = out.index_add(0, place, made * weights[place, nth, None])
            if starved:
                out = out + self._as_if_chosen(expert, hidden, weights)
        return out

    def _as_if_chosen(self, expert: Expert, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Zeros, by way of the expert: its hooks see all tokens, and its outputs the gradients that they would have."""
        made = expert(hidden.detach().requires_grad_(torch.is_grad_enabled()))
        return (made - made.detach()) * weights.mean(1, keepdim=True).detach()

    def starve(self) -> None:
        """Mark the experts that too few tokens came to."""
        self.starved = frozenset(number for number, seen in enumerate(self.seen) if seen < self.needed)


def split_experts(model: nn.Module, names: list[str]) -> None:
    """Put `Experts` in the place of every fused module: gate_up_proj [experts, 2 inner, width] and down_proj."""
    for place, module in list(model.named_modules()):
        parameters = dict(module.named_parameters(recurse=False))
        if set(parameters) == {"gate_up_proj", "down_proj"}:
            count, width, inner = parameters["down_proj"].shape
            model.set_submodule(place, Experts(count, width, inner, names, module.act_fn))


def experts_in(block: nn.Module) -> dict[str, Experts]:
    """The mixtures of a block by their module names."""
    return {name: module for name, module in block.named_modules() if isinstance(module, Experts)}
