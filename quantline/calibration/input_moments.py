"""Second moments of the inputs of a block's linear layers: the Hessian of GPTQ."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from quantline.calibration.sums import LayerSums, narrow, pack_upper, unpack_upper

SAMPLE_TOKENS = 128  # tokens whose inputs are kept
SMALLEST_PEAK = 1e-20  # of a channel that is zero throughout
COLUMNS = 256  # of a product that are computed at once


@dataclass
class InputSums:
    """Of an input that layers read, over some tokens.

    Attributes:
        products: XᵀX on and above the diagonal, float64 [in, in]; None if it is not wanted.
        peak: The largest |x| per channel, float32 [in].
        sample: Some rows of X, float32 [sampled, in] each.
        counted: Tokens whose inputs are finite.
        dropped: The others.
    """

    products: torch.Tensor | None
    peak: torch.Tensor
    sample: list[torch.Tensor] = field(default_factory=list)
    counted: int = 0
    dropped: int = 0

    def add(self, other: Self) -> None:
        """Add further tokens."""
        if self.products is not None and other.products is not None:
            self.products += other.products
        self.peak = torch.maximum(self.peak, other.peak)
        self.sample += other.sample
        self.counted += other.counted
        self.dropped += other.dropped

    def narrow(self) -> None:
        """Round the products to single precision."""
        if self.products is not None:
            narrow(self.products)

    def finish(self) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
        """Return XᵀX / n float32 [in, in], the peak, and the sample as float16 shares of it."""
        hessian = None
        if self.products is not None:
            total = symmetric_from_upper(self.products.cpu())  # where parts are merged
            hessian = total.div_(max(self.counted, 1)).float().numpy()
        shares = torch.cat(self.sample) / self.peak.clamp(min=SMALLEST_PEAK)
        return hessian, {
            "peak": self.peak.cpu().numpy(),
            "sample": shares.half().cpu().numpy(),
        }

    def tensors(self) -> dict[str, np.ndarray]:
        """Return them for `of`."""
        tensors = {
            "peak": self.peak.cpu().numpy(),
            "sample": torch.cat(self.sample).cpu().numpy(),
            "counts": np.array([self.counted, self.dropped]),
        }
        if self.products is not None:
            tensors["products"] = pack_upper(self.products)
        return tensors

    @classmethod
    def of(cls, tensors: dict[str, np.ndarray]) -> Self:
        """Return those that were stored."""
        peak = torch.from_numpy(tensors["peak"])
        packed = tensors.get("products")
        products = None if packed is None else unpack_upper(packed, len(peak))
        counted, dropped = tensors["counts"].tolist()
        return cls(products, peak, [torch.from_numpy(tensors["sample"])], counted, dropped)


class InputMoments:
    """Sums XᵀX over the inputs of a block's linear layers.

    Layers that read the same tensor share one sum; which do is seen from the tensors, not from
    names. Each batch's product is computed in float32 and summed in float64: over a long text
    float32 sums would lose the small channels beside the large ones.

    Attributes:
        layers: Linear layer → {moments: the layer whose sum it shares, tokens: how many it saw},
            with {not_finite: how many} of them whose inputs are NaN or infinite, and do not count.
    """

    def __init__(
        self,
        tokens: int,
        keep: Callable[..., None],
        products: bool = True,
        ends: Collection[int] = (),
        raw: bool = False,
    ) -> None:
        """Make empty sums.

        Args:
            tokens: Tokens of the whole text, over which the sample is evenly spread.
            keep: Called as keep(layer, hessian, peak=, sample=) with what InputSums.finish makes.
            products: Whether to sum XᵀX; `keep` gets None for it otherwise.
            ends: Numbers of the batches with which a part of the text ends.
            raw: Whether `keep` gets what InputSums.tensors makes.
        """
        self.products = products
        self.stride = max(1, tokens // SAMPLE_TOKENS)
        self.layers: dict[str, dict[str, Any]] = {}
        self.ends = ends
        self._sums: LayerSums[InputSums] = LayerSums(keep, raw)
        self._batch = -1  # of the block that runs now
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
        hooks.append(block.register_forward_pre_hook(lambda module, args: self._begin_batch()))
        self._batch = -1
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._seen.clear()
        self._sums.close(self._note_dropped)

    def _begin_batch(self) -> None:
        if self._batch in self.ends:
            self._sums.end_part()
        self._batch += 1
        self._seen.clear()

    def _note_dropped(self, layer: str, sums: InputSums) -> None:
        """Write down how many inputs of the layers that share a sum are not finite."""
        note_dropped(self.layers, layer, sums.dropped)

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

        def empty() -> InputSums:
            products = rows.new_zeros((width, width), dtype=torch.float64)
            return InputSums(products if self.products else None, peak)

        sums = self._sums.of(layer, empty)
        sums.dropped += dropped
        sums.counted += len(rows)
        sums.peak = torch.maximum(sums.peak, peak)
        sums.sample.append(rows[:: self.stride].clone())
        if sums.products is not None:
            add_products(sums.products, rows)


def note_dropped(layers: dict[str, dict[str, Any]], key: str, dropped: int) -> None:
    """Write down how many inputs of the layers that share the sums of `key` are not finite."""
    for entry in layers.values() if dropped else ():
        if entry["moments"] == key:
            entry["not_finite"] = dropped


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
    for start in range(0, len(upper), COLUMNS):
        span = slice(start, start + COLUMNS)
        below = slice(start + COLUMNS, None)
        upper[below, span] = upper[span, below].T
        corner = upper[span, span]
        corner.triu_().add_(corner.triu(1).T)
    return upper
