"""The output factors of the KL divergence's curvature: second moments of the gradients at the linear layers' outputs.

With labels drawn from the model's own next-token distribution the second moment of the gradient is the Fisher matrix,
which is the Hessian of the KL divergence at the unquantized weights. Per layer it is taken as the product of an input
factor H and an output factor G (K-FAC: Martens and Grosse 2015, section 3.1), so that rounding W to W + Δ costs about
tr(G Δ H Δᵀ) / 2. H is in quantline/calibration/collect.py.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from quantline.model.architecture import architecture
from quantline.model.block_runner import BlockRun
from quantline.model.device import device
from quantline.model.checkpoint import Checkpoint
from quantline.model.activation_store import Batches, StoredStates

CHUNK_VALUES = 1 << 24  # logits held at once


def widest(rows: int, limit: int) -> int:
    """The largest divisor of `rows` that is at most `limit`: how many outputs one block of G spans."""
    return next(size for size in range(min(rows, limit), 0, -1) if rows % size == 0)


class Head(NamedTuple):
    """The output head: weight [V, D], and what some families do to the logits (quantline/model/output_head.py)."""

    weight: torch.Tensor
    scale: float = 1.0
    softcap: float | None = None
    bias: torch.Tensor | None = None


def head_of(checkpoint: Checkpoint) -> Head:
    """The head of a checkpoint, on the device where blocks are loaded."""
    facts = architecture(checkpoint)
    weight, bias = (None if one is None else torch.from_numpy(one).to(device())
                    for one in (checkpoint.tensor(facts.head), checkpoint.optional(facts.head_bias)))
    return Head(weight, facts.logit_scale, facts.logit_softcap, bias)


def output_gradient(hidden: torch.Tensor, head: Head, draw: torch.Generator) -> torch.Tensor:
    """d(-log p(label)) / d(hidden) for final hidden states [n, D], labels drawn from p itself."""
    found, (weight, scale, softcap, bias) = torch.empty_like(hidden), head
    step = max(1, CHUNK_VALUES // len(weight))
    for start in range(0, len(hidden), step):
        states = hidden[start:start + step]
        logits = nn.functional.linear(states, weight, bias) * scale
        slope = scale
        if softcap:
            bent = torch.tanh(logits / softcap)
            logits, slope = bent * softcap, scale * (1 - bent**2)
        gradient = torch.softmax(logits, -1)
        points = torch.rand(len(gradient), 1, generator=draw).to(gradient.device)  # drawn on the CPU: the same everywhere
        labels = torch.searchsorted(gradient.cumsum(-1), points).clamp(max=len(weight) - 1)
        gradient.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=gradient.dtype))
        found[start:start + step] = (gradient * slope) @ weight
    return found


def shrunk(products: torch.Tensor, fourth: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(G [blocks, n, n], the intensity of its shrinkage [blocks]) from Σ g gᵀ and Σ |g|⁴ of `count` gradients.

    Where a few tokens have nearly all of the gradient, the sample's moments are far from the text's. Shrinking them towards
    a multiple of the identity by the intensity with the least expected error mends that (Ledoit and Wolf 2004, section 3).
    """
    sample = products / count
    level = sample.diagonal(dim1=-2, dim2=-1).mean(-1)
    squares = sample.square().sum((1, 2))
    distance = squares - sample.shape[-1] * level**2
    noise = (fourth / count - squares) / count
    intensity = torch.where(distance > 0, noise / distance, 1).clamp(0, 1)
    identity = torch.eye(sample.shape[-1], dtype=sample.dtype, device=sample.device)
    return (1 - intensity)[:, None, None] * sample + (intensity * level)[:, None, None] * identity, intensity


class OutputMoments:
    """Sums g gᵀ of the gradients at the outputs of a block's linear layers, in blocks of at most `limit` outputs."""

    def __init__(self, limit: int, keep: Callable[..., None]) -> None:
        """`keep(layer, G, shrinkage=)` takes each finished G, float32 [blocks, size, size], as `shrunk` makes it, and the
        intensity float32 [blocks].
        """
        self.limit, self.keep = limit, keep
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}

    @contextmanager
    def watch(self, prefix: str, block: nn.Module) -> Iterator[None]:
        """Listen to every linear layer of a block while it runs forward and backward."""
        def listen(name: str) -> Callable:
            def on_output(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
                out.register_hook(lambda gradient: self.add(name, gradient))

            return on_output

        hooks = [module.register_forward_hook(listen(f"{prefix}.{name}"))
                 for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.close()

    def close(self) -> None:
        """Hand over the factors of all layers that were seen."""
        for name in sorted(self._sums):
            factors, intensity = (one.float().cpu().numpy() for one in shrunk(*self._sums.pop(name)))
            self.keep(name, factors, shrinkage=intensity)

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """See a gradient [..., out] at a layer's output."""
        width = gradient.shape[-1]
        size = widest(width, self.limit)
        rows = gradient.reshape(-1, width // size, size).transpose(0, 1)
        product, fourth = (rows.transpose(1, 2) @ rows).double(), rows.square().sum(-1).double().square().sum(1)
        if name in self._sums:
            products, fourths, count = self._sums[name]
            product, fourth = products.add_(product), fourths + fourth
        else:
            count = 0
        self._sums[name] = (product, fourth, count + rows.shape[1])


def first_gradients(run: BlockRun, hidden: Iterable[torch.Tensor], head: Head, seed: int) -> Batches:
    """The gradients at what leaves the last block, `hidden`, in its batches."""
    draw, found = torch.Generator().manual_seed(seed), run.hidden.like()
    with run.final_norm() as norm:
        for number, batch in enumerate(hidden):
            states = batch.clone().to(device()).requires_grad_(True)
            final = norm(states)
            flat = final.detach().reshape(-1, final.shape[-1])
            final.backward(output_gradient(flat, head, draw).reshape(final.shape))
            found[number] = states.grad.cpu()
    return found


def backward(run: BlockRun, inputs: StoredStates, gradients: Batches, moments: OutputMoments, last: int,
             after: Callable[[int, Batches], None] | None = None) -> None:
    """Take the `gradients` at what leaves block `last` back to the first, which each block runs again for, from its stored
    input, so that only its own activations are held. `after(block, gradients)` is called when a block is done.
    """
    for index in tqdm(range(last, -1, -1), desc="gradients", unit="block", disable=None):
        with run.loaded(index) as (prefix, block), moments.watch(prefix, block):
            for number, batch in enumerate(inputs.get(index)):
                states = batch.to(device()).requires_grad_(True)
                with torch.enable_grad():
                    run.call(index, states).backward(gradients[number].to(device()))
                gradients[number] = states.grad.cpu()
        if after:
            after(index, gradients)
