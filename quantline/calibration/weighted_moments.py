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
from typing import Self

import numpy as np
import torch
from torch import nn

from quantline.calibration.hooks import after_each
from quantline.calibration.input_moments import add_products, symmetric_from_upper
from quantline.calibration.sums import LayerSums, narrow, pack_upper, unpack_upper


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
class WeightedSums:
    """Of an input that layers read, over some tokens of weights w.

    Attributes:
        products: Σ w x xᵀ on and above the diagonal, float64 [in, in].
        more: Σ w, Σ w², Σ w |x|² and Σ w² |x|², float64 [4].
    """

    products: torch.Tensor
    more: np.ndarray = field(default_factory=lambda: np.zeros(4))

    def add(self, other: Self) -> None:
        """Add further tokens."""
        self.products += other.products
        self.more = self.more + other.more

    def narrow(self) -> None:
        """Round the products to single precision."""
        narrow(self.products)

    def finish(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return H, whose trace is what inputs cost, and how many tokens alike are as many."""
        weights, squares, sizes, costs = self.more.tolist()
        hessian = symmetric_from_upper(self.products.cpu())  # where parts are merged
        if sizes > 0 and squares > 0:
            hessian *= costs / squares / sizes
        effective = weights**2 / squares if squares > 0 else 0.0
        return hessian.float().numpy(), {"effective_tokens": np.array([effective], np.float32)}

    def tensors(self) -> dict[str, np.ndarray]:
        """Return them for `of`."""
        width = np.array([len(self.products)])
        return {"products": pack_upper(self.products), "more": self.more, "width": width}

    @classmethod
    def of(cls, tensors: dict[str, np.ndarray]) -> Self:
        """Return those that were stored."""
        products = unpack_upper(tensors["products"], int(tensors["width"][0]))
        return cls(products, tensors["more"])


class WeightedMoments:
    """Sums w x xᵀ over the inputs of a block's linear layers, in the backward pass."""

    def __init__(self, keep: Callable[..., None], raw: bool = False) -> None:
        """Make empty sums.

        Args:
            keep: Called as keep(layer, hessian, effective_tokens=) with each finished sum: float32
                [in, in], whose trace is what inputs cost that are weighted by |g|², so that
                tr(G) tr(H) is E[|g|² |x|²]; and how many tokens of equal weight would be as many,
                float32 [1].
            raw: Whether `keep` gets what WeightedSums.tensors makes.
        """
        self._sums: LayerSums[WeightedSums] = LayerSums(keep, raw)
        self._readings: list[Reading] = []

    @contextmanager
    def watch(self, linears: dict[str, nn.Linear]) -> Iterator[None]:
        """Register hooks on the linear layers, by name, of a block that runs both ways."""
        try:
            with after_each(linears, self._note):
                yield
        finally:
            self._readings.clear()
        self._sums.close()

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

    def end_part(self) -> None:
        """End a part of the text."""
        self._sums.end_part()

    def _add(self, layer: str, rows: torch.Tensor, weights: torch.Tensor) -> None:
        sizes = rows.square().sum(1)
        finite = sizes.isfinite() & weights.isfinite()
        if not finite.all():
            rows, weights, sizes = rows[finite], weights[finite], sizes[finite]
        width = rows.shape[1]
        sums = self._sums.of(
            layer, lambda: WeightedSums(rows.new_zeros((width, width), dtype=torch.float64))
        )
        add_products(sums.products, rows * weights.sqrt()[:, None])
        exact, sizes = weights.double(), sizes.double()
        squared = exact.square()
        more = (exact, squared, exact * sizes, squared * sizes)
        sums.more = sums.more + [float(values.sum()) for values in more]
