"""The experts of a MoE block as linear layers of their own, as most checkpoints hold them.

transformers fuses them into one parameter. Calibration needs them apart: each has its own inputs,
the tokens that the router sends to it. An expert that too few tokens reach is undercalibrated: its
Hessian would have hardly any rank. It is calibrated as if every token of the text reached it, with
the mean of the weights that the router gave to the experts that it chose. What the block computes
stays the same.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

NEEDED_SHARE = 4  # an expert needs at least its widest input divided by this in tokens


class Expert(nn.Module):
    """down(hidden(gate(x), up(x))); without a gate, down(hidden(up(x)))."""

    def __init__(
        self, layers: dict[str, nn.Linear], hidden: Callable[..., torch.Tensor], norm: Callable
    ) -> None:
        """Take the layers.

        Args:
            layers: Name → layer; gate (if there is one), up and down, in this order.
            hidden: What is between them, called with the outputs of all but the last.
            norm: What its output goes through before it is weighted.
        """
        super().__init__()
        self.names = list(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._between = [hidden, norm]  # in a list, as all experts share them: no modules of it

    def forward(self, rows: torch.Tensor, run: Callable = nn.Module.__call__) -> torch.Tensor:
        """Compute the expert.

        Args:
            rows: float [tokens, width].
            run: How a layer is called; nn.Linear.forward to bypass hooks.

        Returns:
            float [tokens, width].
        """
        *before, down = (getattr(self, name) for name in self.names)
        hidden, norm = self._between
        return norm(run(down, hidden(*(run(layer, rows) for layer in before))))


class Experts(nn.Module):
    """All experts of a block, in the place of transformers' module, whose function this is.

    Attributes:
        needed: Tokens that an expert has to see.
        tokens_seen: Tokens that came to each expert.
        undercalibrated: The experts that are calibrated on all tokens.
    """

    def __init__(self, experts: list[nn.Module], widest: int) -> None:
        """Take the experts, which get their numbers for names; their widest input is `widest`."""
        super().__init__()
        self.count = len(experts)
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)
        self.needed = widest / NEEDED_SHARE
        self.tokens_seen = [0] * len(experts)
        self.undercalibrated: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[nn.Module]:
        return (self._modules[str(number)] for number in range(self.count))  # type: ignore[misc]

    def linears(self, number: int) -> list[str]:
        """Return the names, inside of this module, of the linear layers of an expert."""
        expert = self._modules[str(number)]
        if isinstance(expert, nn.Linear):
            return [str(number)]
        assert isinstance(expert, Expert)
        return [f"{number}.{name}" for name in expert.names]

    def mark_undercalibrated(self) -> None:
        """Mark the experts that too few tokens reached."""
        self.undercalibrated = frozenset(
            number for number, seen in enumerate(self.tokens_seen) if seen < self.needed
        )


class RoutedExperts(Experts):
    """Experts that are told which tokens are theirs, and how much each counts."""

    def forward(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute the weighted sum of the experts that each token is sent to.

        Args:
            hidden: [..., width].
            chosen: int [tokens, used], the experts of each token.
            weights: [tokens, used], how much each counts.

        Returns:
            As `hidden`.
        """
        shape = hidden.shape
        hidden = hidden.reshape(-1, shape[-1])
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            bypass_hooks = number in self.undercalibrated
            token, choice = torch.where(chosen == number)
            if torch.jit.is_tracing() or len(token):  # a trace has to hold every expert
                self.tokens_seen[number] += len(token)
                rows = hidden[token]
                result = expert(rows, nn.Linear.forward) if bypass_hooks else expert(rows)
                out = out.index_add(0, token, result * weights[token, choice, None])
            if bypass_hooks:
                out = out + self._as_if_chosen(expert, hidden, weights)
        return out.reshape(shape)

    def _as_if_chosen(
        self, expert: nn.Module, hidden: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the expert on all tokens for its hooks.

        The returned value is zero, the gradients at the expert's outputs are not: they are those of
        an expert that every token is sent to with the mean of its weights.
        """
        result = expert(hidden.detach().requires_grad_(torch.is_grad_enabled()))
        return (result - result.detach()) * weights.mean(1, keepdim=True).detach()


class SortedExperts(Experts):
    """Experts that get rows which are sorted by expert already (Llama 4, JetMoE).

    Rows of zeros belong to tokens that were sent elsewhere; they stay zero.
    """

    def forward(self, rows: torch.Tensor, counts: list[int] | None = None) -> torch.Tensor:
        """Compute each expert on its rows.

        Args:
            rows: [rows, width].
            counts: Rows of each expert; equal numbers if it is None.

        Returns:
            [rows, out].
        """
        per_token = counts is None  # each expert has a row for every token
        # Cut into equal parts in a way that a trace does not take for parts of one size.
        equal = rows.reshape(self.count, -1, rows.shape[-1]).unbind(0) if per_token else ()
        parts = list(equal) if counts is None else list(rows.split(counts, 0))
        results = []
        for number, (expert, part) in enumerate(zip(self, parts, strict=True)):
            bypass_hooks = number in self.undercalibrated
            run = nn.Linear.forward if bypass_hooks else nn.Module.__call__
            used = part.abs().amax(-1) > 0 if per_token and not _exports() else None
            kept = part if used is None else part[used]
            if not _exports():
                self.tokens_seen[number] += len(kept)
            result = _run(expert, kept, run)
            if used is not None:
                whole = result.new_zeros((len(part), result.shape[-1]))
                result = whole.index_put((used,), result)
            results.append(result)
            if bypass_hooks and per_token:
                results[-1] = result + self._for_hooks(expert, torch.stack(parts).sum(0))
        out = torch.cat(results)
        if not per_token:
            for number in sorted(self.undercalibrated):
                out = out + self._for_hooks(self._modules[str(number)], rows)
        return out

    def _for_hooks(self, expert: nn.Module | None, rows: torch.Tensor) -> torch.Tensor:
        """Run an expert on rows of other experts for its hooks; the value is zero."""
        assert expert is not None
        alone = rows.detach().requires_grad_(torch.is_grad_enabled())
        result = _run(expert, alone, nn.Module.__call__)
        return result - result.detach()


def _exports() -> bool:
    """Whether a graph is made, in which numbers of rows are not known."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def _run(expert: nn.Module, rows: torch.Tensor, run: Callable) -> torch.Tensor:
    """Run an expert, or one that is a single linear layer, by `run` (see Expert.forward)."""
    return run(expert, rows) if isinstance(expert, nn.Linear) else expert(rows, run)


def experts_in(block: nn.Module) -> dict[str, Experts]:
    """Return the experts of a MoE block by their module's name; nothing for a dense block."""
    return {name: module for name, module in block.named_modules() if isinstance(module, Experts)}
