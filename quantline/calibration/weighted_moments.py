"""Second moments of inputs in which each token counts by what an error at it would cost.

E[x xᵀ] counts all tokens alike. In trained language models a few, such as the first of a sequence,
have enormous inputs in single channels and hardly any gradient: they fill the moments with what
does not matter. Here a token counts by |g|, the size of the gradient at the output of a layer;
where several layers read one input, by the sum of theirs, in which all have the same part. So has
each batch of sequences: text that the model finds hard does not count alone, and no batch depends
on another.

Counting by |g|² is the first step towards the Kronecker product nearest to the true Fisher matrix
(Tseng et al. 2025, arXiv 2505.22988; by groups of outputs Kim et al. 2025, arXiv 2505.07004); |g|
leaves more tokens with a say, which a calibration of some ten thousand tokens needs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from quantline.calibration.hooks import after_each
from quantline.calibration.input_moments import add_products, symmetric_from_upper


@dataclass
class Reading:
    """One tensor that layers read, and the gradients at their outputs.

    Attributes:
        inputs: float32 [..., in].
        layer: The first layer that read it.
        sizes: Layer that read it → |g| at its output [tokens], once it came.
        reached: Whether gradients can come to a layer that read it.
    """

    inputs: torch.Tensor
    layer: str
    sizes: dict[str, torch.Tensor] = field(default_factory=dict)
    reached: bool = False

    def add(self, layer: str, gradient: torch.Tensor) -> None:
        """Take the gradient [..., out] at the output of a layer."""
        self.sizes[layer] = gradient.detach().reshape(-1, gradient.shape[-1]).norm(dim=-1)

    def weights(self) -> torch.Tensor:
        """Return how much each token counts, [tokens]: alike, where no gradient can come."""
        tokens = self.inputs.numel() // self.inputs.shape[-1]
        total = torch.full((tokens,), 0.0 if self.reached else 1.0, device=self.inputs.device)
        for _, sizes in sorted(self.sizes.items()):
            mean = float(sizes[sizes.isfinite()].double().mean()) if len(sizes) else 0.0
            if mean > 0:
                total += sizes / mean
        return total


@dataclass
class WeightedSum:
    """Σ w x xᵀ of an input, on and above the diagonal, and what it is divided and scaled by."""

    products: torch.Tensor  # float64 [in, in]
    weights: float = 0.0  # Σ w
    squares: float = 0.0  # Σ w²
    sizes: float = 0.0  # Σ w |x|²
    costs: float = 0.0  # Σ w² |x|²


@dataclass
class WeightedMoments:
    """Sums w x xᵀ over the inputs of a block's linear layers, in the backward pass.

    Attributes:
        keep: Called as keep(layer, hessian, effective_tokens=) with each finished sum: float32
            [in, in], whose trace is what inputs cost that are weighted by |g|², so that tr(G) tr(H)
            is E[|g|² |x|²]; and how many tokens of equal weight would be as many, float32 [1].
    """

    keep: Callable[..., None]
    _sums: dict[str, WeightedSum] = field(default_factory=dict)
    _readings: list[Reading] = field(default_factory=list)

    @contextmanager
    def watch(self, linears: dict[str, nn.Linear]) -> Iterator[None]:
        """Register hooks on the linear layers, by name, of a block that runs both ways."""
        try:
            with after_each(linears, self._note):
                yield
        finally:
            self._readings.clear()
        for layer in sorted(self._sums):
            self._hand_over(layer, self._sums.pop(layer))

    def _note(self, layer: str, inputs: torch.Tensor, out: torch.Tensor) -> None:
        """Remember what a layer has read, and wait for the gradient at its output."""
        reading = next((one for one in self._readings if one.inputs is inputs), None)
        if reading is None:
            reading = Reading(inputs, layer)
            self._readings.append(reading)
        if out.requires_grad:
            reading.reached = True
            out.register_hook(partial(reading.add, layer))

    def end_batch(self) -> None:
        """Add what was read since the last batch, whose gradients are there now."""
        for reading in self._readings:
            rows = reading.inputs.detach().reshape(-1, reading.inputs.shape[-1])
            self._add(reading.layer, rows, reading.weights())
        self._readings.clear()

    def _add(self, layer: str, rows: torch.Tensor, weights: torch.Tensor) -> None:
        sizes = rows.square().sum(1)
        finite = sizes.isfinite() & weights.isfinite()
        if not finite.all():
            rows, weights, sizes = rows[finite], weights[finite], sizes[finite]
        if layer not in self._sums:
            width = rows.shape[1]
            zeros = rows.new_zeros((width, width), dtype=torch.float64)
            self._sums[layer] = WeightedSum(zeros)
        total = self._sums[layer]
        add_products(total.products, rows * weights.sqrt()[:, None])
        exact, sizes = weights.double(), sizes.double()
        total.weights += float(exact.sum())
        total.squares += float(exact.square().sum())
        total.sizes += float((exact * sizes).sum())
        total.costs += float((exact.square() * sizes).sum())

    def _hand_over(self, layer: str, total: WeightedSum) -> None:
        hessian = symmetric_from_upper(total.products)
        if total.sizes > 0 and total.squares > 0:
            hessian *= total.costs / total.squares / total.sizes
        effective = total.weights**2 / total.squares if total.squares > 0 else 0.0
        self.keep(
            layer,
            hessian.float().cpu().numpy(),
            effective_tokens=torch.tensor([effective]).numpy(),
        )
