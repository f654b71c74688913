"""Second moments of the gradients at the linear layers' outputs: how much each output error costs.

With labels drawn from the model's own next-token distribution, the second moment of the gradient is
the Fisher matrix, which is the Hessian of the KL divergence at the unquantized weights. Per layer
it is taken as the product of an input factor H and an output factor G (K-FAC: Martens and Grosse
2015, section 3.1), so that rounding W to W + Δ costs about tr(G Δ H Δᵀ) / 2.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import nn

from quantline.calibration.hooks import after_each
from quantline.calibration.sums import LayerSums, narrow
from quantline.calibration.weighted_moments import WeightedMoments
from quantline.model.activation_store import ActivationBatches, ActivationStore
from quantline.model.block_runner import BlockRun
from quantline.model.device import device
from quantline.model.output_head import OutputHead
from quantline.model.shared_state import SharedState
from quantline.run.progress import progress

CHUNK_VALUES = 1 << 24  # logits held at once


def widest_divisor(rows: int, limit: int) -> int:
    """Return the largest divisor of `rows` up to `limit`: how many outputs a block of G spans."""
    return next(size for size in range(min(rows, limit), 0, -1) if rows % size == 0)


def sampled_gradient(
    hidden: torch.Tensor, head: OutputHead, generator: torch.Generator
) -> torch.Tensor:
    """Return d(-log p(label)) / d(hidden), with labels drawn from p itself.

    Args:
        hidden: Final hidden states float32 [n, D].
        head: The output head, with torch tensors.
        generator: Draws the labels, on the CPU, so that they are the same on every device.
    """
    gradients = torch.empty_like(hidden)
    step = max(1, CHUNK_VALUES // len(head))
    for start in range(0, len(hidden), step):
        logits, slope = head.logits_and_slope(hidden[start : start + step])
        probabilities = torch.softmax(logits, -1)
        points = torch.rand(len(probabilities), 1, generator=generator).to(logits.device)
        labels = torch.searchsorted(probabilities.cumsum(-1), points).clamp(max=len(head) - 1)
        ones = torch.full_like(labels, -1, dtype=probabilities.dtype)
        by_logits = probabilities.scatter_add_(1, labels, ones)
        gradients[start : start + step] = (by_logits * slope) @ head.weight
    return gradients


def shrink(
    products: torch.Tensor, fourth_powers: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate G from sums over a sample.

    Where a few tokens have nearly all of the gradient, the sample's moments are far from the
    text's. Shrinking them towards a multiple of the identity, by the intensity with the least
    expected error, mends that (Ledoit and Wolf 2004, section 3).

    Args:
        products: Σ g gᵀ [blocks, n, n].
        fourth_powers: Σ |g|⁴ [blocks].
        count: Number of gradients.

    Returns:
        G [blocks, n, n], and the intensity of the shrinkage [blocks].
    """
    count = max(count, 1)
    sample = products / count
    level = sample.diagonal(dim1=-2, dim2=-1).mean(-1)
    squares = sample.square().sum((1, 2))
    distance = squares - sample.shape[-1] * level**2
    noise = (fourth_powers / count - squares) / count
    intensity = torch.where(distance > 0, noise / distance, 1).clamp(0, 1)
    identity = torch.eye(sample.shape[-1], dtype=sample.dtype, device=sample.device)
    kept = (1 - intensity)[:, None, None] * sample
    return kept + (intensity * level)[:, None, None] * identity, intensity


@dataclass
class OutputSums:
    """Of the gradients at a layer's output, over some tokens.

    Attributes:
        products: Σ g gᵀ float64 [blocks, n, n].
        fourth_powers: Σ |g|⁴ float64 [blocks].
        count: Number of gradients.
    """

    products: torch.Tensor
    fourth_powers: torch.Tensor
    count: int

    def add(self, other: Self) -> None:
        """Add further tokens."""
        self.products += other.products
        self.fourth_powers = self.fourth_powers + other.fourth_powers
        self.count += other.count

    def narrow(self) -> None:
        """Round the products to single precision."""
        narrow(self.products)

    def finish(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return G float32 [blocks, n, n] and the intensity of its shrinkage float32 [blocks].

        They are computed on the CPU, where the sums of parts are merged.
        """
        sums = (self.products.cpu(), self.fourth_powers.cpu(), self.count)
        fisher_out, intensity = shrink(*sums)
        return fisher_out.float().numpy(), {"shrinkage": intensity.float().numpy()}

    def tensors(self) -> dict[str, np.ndarray]:
        """Return them for `of`."""
        return {
            "products": self.products.float().cpu().numpy(),
            "fourth_powers": self.fourth_powers.cpu().numpy(),
            "count": np.array([self.count]),
        }

    @classmethod
    def of(cls, tensors: dict[str, np.ndarray]) -> Self:
        """Return those that were stored."""
        products = torch.from_numpy(tensors["products"]).double()
        fourth_powers = torch.from_numpy(tensors["fourth_powers"])
        return cls(products, fourth_powers, int(tensors["count"][0]))


class OutputMoments:
    """Sums g gᵀ of the gradients at the outputs of a block's linear layers."""

    def __init__(self, limit: int, keep: Callable[..., None], raw: bool = False) -> None:
        """Make empty sums.

        Args:
            limit: Outputs that one block of G spans at most.
            keep: Called as keep(layer, fisher_out, shrinkage=) with what OutputSums.finish makes.
            raw: Whether `keep` gets what OutputSums.tensors makes.
        """
        self.limit = limit
        self._sums: LayerSums[OutputSums] = LayerSums(keep, raw)

    @contextmanager
    def watch(self, linears: dict[str, nn.Linear]) -> Iterator[None]:
        """Register hooks on the linear layers, by name, of a block that runs both ways."""

        def note(name: str, inputs: torch.Tensor, out: torch.Tensor) -> None:
            if out.requires_grad:  # not of what reads what no block has made
                out.register_hook(lambda gradient: self.add(name, gradient))

        with after_each(linears, note):
            yield
        self.close()

    def add(self, layer: str, gradient: torch.Tensor) -> None:
        """Add gradients [..., out] at a layer's output."""
        width = gradient.shape[-1]
        size = widest_divisor(width, self.limit)
        flat = gradient.reshape(-1, width)
        rows = flat.reshape(-1, width // size, size).transpose(0, 1)
        product = rows.transpose(1, 2) @ rows
        if not product.isfinite().all():
            flat = flat[flat.isfinite().all(1)]  # a sequence on which the model overflows
            rows = flat.reshape(-1, width // size, size).transpose(0, 1)
            product = rows.transpose(1, 2) @ rows
        sums = self._sums.of(
            layer,
            lambda: OutputSums(
                torch.zeros_like(product, dtype=torch.float64),
                product.new_zeros(len(product), dtype=torch.float64),
                0,
            ),
        )
        sums.products += product
        sums.fourth_powers += rows.square().sum(-1).double().square().sum(1)
        sums.count += rows.shape[1]

    def end_part(self) -> None:
        """End a part of the text."""
        self._sums.end_part()

    def close(self, before: Callable[[str, OutputSums], None] | None = None) -> None:
        """Hand over G of all layers that were seen; `before` gets the sums of each first."""
        self._sums.close(before)


def last_block_gradients(
    run: BlockRun,
    hidden: Iterable[torch.Tensor],
    head: OutputHead,
    seed: int,
    tokens_before: int = 0,
) -> ActivationBatches:
    """Return the gradients at what leaves the last block.

    Args:
        run: The model.
        hidden: What leaves the last block, in batches.
        head: The output head, with torch tensors.
        seed: Of the labels that are drawn.
        tokens_before: Of the text before these batches, for which labels are drawn elsewhere.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.rand(tokens_before, 1, generator=generator)
    gradients = run.hidden.like()
    with run.tail() as tail:
        for index, batch in enumerate(hidden):
            states = batch.clone().to(device()).requires_grad_(True)
            with torch.enable_grad():
                final = tail(index, states)
            flat = final.detach().reshape(-1, final.shape[-1])
            final.backward(sampled_gradient(flat, head, generator).reshape(final.shape))
            assert states.grad is not None
            gradients[index] = states.grad.cpu()
    return gradients


def backward(
    run: BlockRun,
    inputs: ActivationStore,
    gradients: ActivationBatches,
    moments: OutputMoments,
    last: int,
    after: Callable[[int, ActivationBatches], None] | None = None,
    weighted: WeightedMoments | None = None,
    ends: Collection[int] = (),
) -> None:
    """Take gradients back to the first block.

    Each block runs again from its stored input, so that only its own activations are held.

    Args:
        run: The model.
        inputs: What enters each block, by its number.
        gradients: At what leaves block `last`; they become those at what enters the first block.
        moments: Its hooks are on each block while that runs.
        last: The block to begin with.
        after: after(index, gradients) is called when a block is done.
        weighted: Its hooks are there as well.
        ends: Numbers of the batches with which a part of the text ends.
    """
    for index in progress(range(last, -1, -1), "backward pass (2 of 2)", "block"):
        with run.loaded(index) as (linears, _), ExitStack() as watching:
            watching.enter_context(moments.watch(linears))
            if weighted:
                watching.enter_context(weighted.watch(linears))
            for number, batch in enumerate(inputs.get(index)):
                states = batch.to(device()).requires_grad_(True)
                with torch.enable_grad():
                    out = run.call(index, number, states, backward=True)
                    go_back(run.shared(number), out, gradients[number].to(device()))
                assert states.grad is not None
                gradients[number] = states.grad.cpu()
                if weighted:
                    weighted.end_batch()
                if number in ends:
                    moments.end_part()
                    if weighted:
                        weighted.end_part()
        if after:
            after(index, gradients)


def go_back(shared: list[SharedState], out: torch.Tensor, gradient: torch.Tensor) -> None:
    """Take gradients back through a block, also those at what it left for later blocks."""
    ends = [(out, gradient), *(pair for state in shared for pair in state.outputs())]
    torch.autograd.backward([end for end, _ in ends], [given for _, given in ends])
    for state in shared:
        state.keep_gradients()
