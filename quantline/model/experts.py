"""The experts of a MoE block as linear layers of their own, as checkpoints hold them.

transformers fuses them into one parameter. Calibration needs them apart: each has its own inputs,
the tokens that the router sends to it. An expert that too few tokens reach is undercalibrated: its
Hessian would have hardly any rank. It is calibrated as if every token of the text reached it, with
the mean of the weights that the router gave to the experts that it chose. What the block computes
stays the same.
"""

from collections.abc import Callable

import torch
from torch import nn

NEEDED_SHARE = 4  # an expert needs at least its widest input divided by this in tokens


class Expert(nn.Module):
    """down(activation(gate(x)) * up(x)); `names` are what the checkpoint calls the three."""

    def __init__(self, width: int, inner: int, names: list[str], activation: nn.Module) -> None:
        """Make the three layers, for inputs of `width` and `inner` hidden units."""
        super().__init__()
        self.names = names
        self.activation = activation
        gate, up, down = names
        self.add_module(gate, nn.Linear(width, inner, bias=False))
        self.add_module(up, nn.Linear(width, inner, bias=False))
        self.add_module(down, nn.Linear(inner, width, bias=False))

    def forward(self, rows: torch.Tensor, run: Callable = nn.Module.__call__) -> torch.Tensor:
        """Compute the expert.

        Args:
            rows: float [tokens, width].
            run: How a layer is called; nn.Linear.forward to bypass hooks.

        Returns:
            float [tokens, width].
        """
        gate, up, down = (getattr(self, name) for name in self.names)
        return run(down, self.activation(run(gate, rows)) * run(up, rows))


class Experts(nn.ModuleList):
    """All experts of a block, in the place of transformers' module, whose function this is.

    Attributes:
        needed: Tokens that an expert has to see.
        tokens_seen: Tokens that came to each expert.
        undercalibrated: The experts that are calibrated on all tokens.
    """

    def __init__(
        self, count: int, width: int, inner: int, names: list[str], activation: nn.Module
    ) -> None:
        """Make `count` experts (see Expert)."""
        super().__init__(Expert(width, inner, names, activation) for _ in range(count))
        self.needed = max(width, inner) / NEEDED_SHARE
        self.tokens_seen = [0] * count
        self.undercalibrated: frozenset[int] = frozenset()

    def forward(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute the weighted sum of the experts that each token is sent to.

        Args:
            hidden: [tokens, width].
            chosen: int [tokens, used], the experts of each token.
            weights: [tokens, used], how much each counts.

        Returns:
            [tokens, width].
        """
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            assert isinstance(expert, Expert)
            bypass_hooks = number in self.undercalibrated
            token, choice = torch.where(chosen == number)
            if torch.jit.is_tracing() or len(token):  # a trace has to hold every expert
                self.tokens_seen[number] += len(token)
                rows = hidden[token]
                result = expert(rows, nn.Linear.forward) if bypass_hooks else expert(rows)
                out = out.index_add(0, token, result * weights[token, choice, None])
            if bypass_hooks:
                out = out + self._as_if_chosen(expert, hidden, weights)
        return out

    def _as_if_chosen(
        self, expert: Expert, hidden: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the expert on all tokens for its hooks.

        The returned value is zero, the gradients at the expert's outputs are not: they are those of
        an expert that every token is sent to with the mean of its weights.
        """
        result = expert(hidden.detach().requires_grad_(torch.is_grad_enabled()))
        return (result - result.detach()) * weights.mean(1, keepdim=True).detach()

    def mark_undercalibrated(self) -> None:
        """Mark the experts that too few tokens reached."""
        self.undercalibrated = frozenset(
            number for number, seen in enumerate(self.tokens_seen) if seen < self.needed
        )


def split_experts(model: nn.Module, names: list[str]) -> None:
    """Put `Experts` in the place of every fused module of gate_up_proj and down_proj."""
    for name, module in list(model.named_modules()):
        parameters = dict(module.named_parameters(recurse=False))
        if set(parameters) == {"gate_up_proj", "down_proj"}:
            count, width, inner = parameters["down_proj"].shape
            model.set_submodule(name, Experts(count, width, inner, names, module.act_fn))


def experts_in(block: nn.Module) -> dict[str, Experts]:
    """Return the experts of a MoE block by their module's name; nothing for a dense block."""
    return {name: module for name, module in block.named_modules() if isinstance(module, Experts)}
