"""Second moments of the inputs of a block's linear layers: the Hessian of GPTQ."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SAMPLE_TOKENS = 128  # tokens whose inputs are kept
SMALLEST_PEAK = 1e-20  # of a channel that is zero throughout
COLUMNS = 256  # of a product that are computed at once


class InputMoments:
    """Sums XᵀX over the inputs of a block's linear layers.

    Layers that read the same tensor share one sum; which do is seen from the tensors, not from
    names. Each batch's product is computed in float32 and summed in float64: over a long text
    float32 sums would lose the small channels beside the large ones.

    Attributes:
        layers: Linear layer → {moments: the layer whose sum it shares, tokens: how many it saw},
            with {not_finite: how many} of them whose inputs are NaN or infinite, and do not count.
    """

    def __init__(self, tokens: int, keep: Callable[..., None], products: bool = True) -> None:
        """Make empty sums.

        Args:
            tokens: Tokens of the whole text, over which the sample is evenly spread.
            keep: Called as keep(layer, hessian, peak=, sample=) with each finished XᵀX / n
                float32 [in, in], the largest |x| per channel float32 [in], and some rows of X as
                shares of that, float16 [sampled, in].
            products: Whether to sum XᵀX; `keep` gets None for it otherwise.
        """
        self.keep = keep
        self.products = products
        self.stride = max(1, tokens // SAMPLE_TOKENS)
        self.layers: dict[str, dict[str, Any]] = {}
        # Of the block that runs now, by the first layer that reads an input:
        self._sums: dict[str, torch.Tensor] = {}  # XᵀX on and above the diagonal
        self._peaks: dict[str, torch.Tensor] = {}
        self._samples: dict[str, list[torch.Tensor]] = {}
        self._dropped: dict[str, int] = {}
        # Inputs of this batch; they are held, so that none takes another's address.
        self._seen: list[tuple[torch.Tensor, str]] = []

    @contextmanager
    def watch(self, linears: dict[str, nn.Linear], block: nn.Module) -> Iterator[None]:
        """Register hooks on the linear layers of a running block; then hand over their sums.

        Args:
            linears: The layers, by their names.
            block: The block.
        """

        def hook_of(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                self._record(name, args[0])

            return before

        hooks = [
            module.register_forward_pre_hook(hook_of(name)) for name, module in linears.items()
        ]
        hooks.append(block.register_forward_pre_hook(lambda module, args: self._seen.clear()))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._seen.clear()
        while self._peaks:
            self._hand_over(next(iter(self._peaks)))

    def _hand_over(self, layer: str) -> None:
        """Finish the sum of an input and drop it."""
        dropped = self._dropped.pop(layer)
        if dropped:
            self._note_dropped(layer, dropped)
        hessian = None
        if self.products:
            counted = self.layers[layer]["tokens"] - dropped
            total = symmetric_from_upper(self._sums.pop(layer))
            hessian = total.div_(max(counted, 1)).float().cpu().numpy()
        peak = self._peaks.pop(layer)
        shares = torch.cat(self._samples.pop(layer)) / peak.clamp(min=SMALLEST_PEAK)
        self.keep(
            layer,
            hessian,
            peak=peak.cpu().numpy(),
            sample=shares.half().cpu().numpy(),
        )

    def _note_dropped(self, layer: str, dropped: int) -> None:
        """Write down how many inputs of the layers that share a sum are not finite."""
        for entry in self.layers.values():
            if entry["moments"] == layer:
                entry["not_finite"] = dropped

    def _record(self, layer: str, inputs: torch.Tensor) -> None:
        """Add the inputs [batch, length, in] that a layer is about to read."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        key = next((first for tensor, first in self._seen if tensor is inputs), None)
        if key is None:
            key = layer
            self._seen.append((inputs, layer))
            self._add(layer, rows)
        entry = self.layers.setdefault(layer, {"moments": key, "tokens": 0})
        entry["tokens"] += len(rows)

    def _add(self, layer: str, rows: torch.Tensor) -> None:
        width = rows.shape[1]
        peak = rows.abs().amax(0)
        dropped = 0
        if not peak.isfinite().all():
            finite = rows.isfinite().all(1)
            dropped = int((~finite).sum())
            rows = rows[finite]
            peak = rows.abs().amax(0) if len(rows) else torch.zeros_like(peak)
        self._dropped[layer] = self._dropped.get(layer, 0) + dropped
        if layer not in self._peaks:
            self._peaks[layer] = peak
            self._samples[layer] = []
        if self.products:
            if layer not in self._sums:
                self._sums[layer] = rows.new_zeros((width, width), dtype=torch.float64)
            add_products(self._sums[layer], rows)
        self._peaks[layer] = torch.maximum(self._peaks[layer], peak)
        self._samples[layer].append(rows[:: self.stride].clone())


def add_products(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add XᵀX to what lies on and above the diagonal of `total`.

    Little is computed of what lies below the diagonal.

    Args:
        total: float64 [in, in].
        rows: X, float32 [n, in].
    """
    for start in range(0, rows.shape[1], COLUMNS):
        span = slice(start, start + COLUMNS)
        total[span, start:] += rows[:, span].T @ rows[:, start:]


def symmetric_from_upper(upper: torch.Tensor) -> torch.Tensor:
    """Make a matrix symmetric, in place, from what lies on and above its diagonal."""
    return upper.triu_().add_(upper.triu(1).T)
