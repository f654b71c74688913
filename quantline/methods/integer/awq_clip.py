"""The clipping search of AWQ (Lin et al. 2023, section 3.3) with the layer's whole output error as the judge.

The authors clip each group by the error of that group's own product. Groups feel each other through the correlations of
their inputs, so here one group after another takes the span that leaves the least Δ H Δᵀ given all others as they stand.
"""

import numba
import numpy as np
import torch

from quantline.quantized.store import GroupedLinear
from quantline.methods.integer.grid import (
    canonical,
    choose_rows,
    grid_between,
    least_span,
    round_to,
    span_of,
)
from quantline.methods.threads import over_rows

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # of a group's least and of its greatest weight
SWEEPS = 2


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _best_spans(weights, now, pull, own, scales, zeros, top, found):
    """Per row the span whose grid lowers 2 · pull · m + m · own · m the most, m its move; found is -1 where none does.

    weights, now, pull [rows, group]: what is to be rounded, what stands now, Δ H; own [group, group] is H's part;
    scales, zeros [rows, spans]. Spans are ranked by the diagonal of `own`, and the first is judged by all of it: judging
    four of them gave the same divergence (benchmarks/README.md).
    """
    rows, width = weights.shape
    move, diagonal = np.empty(width, np.float32), np.empty(width, np.float32)
    for j in range(width):
        diagonal[j] = own[j, j]
    for row in range(rows):
        best = least_span(weights[row], now[row], pull[row], diagonal, scales[row], zeros[row], top)
        scale, zero, cost = scales[row, best], zeros[row, best], np.float32(0)
        for j in range(width):
            integer = min(max(np.rint(weights[row, j] / scale) + zero, np.float32(0)), top)
            move[j] = (integer - zero) * scale - now[row, j]
        for j in range(width):
            felt = np.float32(0)
            for k in range(width):
                felt += own[j, k] * move[k]
            cost += (2 * pull[row, j] + felt) * move[j]
        found[row] = best if cost < 0 else -1


def best_spans(weights: torch.Tensor, now: torch.Tensor, pull: torch.Tensor, own: torch.Tensor, scales: torch.Tensor,
               zeros: torch.Tensor, top: int) -> torch.Tensor:
    """`_best_spans` in threads: the number of the span of each row, or -1."""
    found = np.empty(len(weights), np.int64)
    parts = [one.contiguous().cpu().numpy() for one in (weights, now, pull, scales, zeros)]
    square = own.contiguous().cpu().numpy()

    def run(rows: slice) -> None:
        weight, stands, felt, scale, zero = (part[rows] for part in parts)
        _best_spans(weight, stands, felt, square, scale, zero, np.float32(top), found[rows])

    over_rows(len(weights), run)
    return torch.from_numpy(found).to(weights.device)


def quantize(weight: torch.Tensor, moment: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> GroupedLinear:
    """A weight [out, in] rounded to nearest on spans chosen with H = `moment` [in, in].

    Each row starts on its min-max grids and keeps them if the search ends with a larger Δ H Δᵀ.
    """
    grouped = weight.reshape(len(weight), -1, group_size)
    low, high = span_of(grouped)
    scales, zeros = grid_between(low, high, bits, symmetric)
    integers = round_to(grouped, scales, zeros, bits)

    def made() -> GroupedLinear:
        return canonical(integers.reshape(weight.shape), scales[..., 0], zeros[..., 0], bits, group_size, symmetric)

    plain = made()
    pull = ((integers - zeros) * scales - grouped).reshape(weight.shape) @ moment
    pairs = [(one, other) for one in SHARES for other in SHARES if one == other or not symmetric]
    lows, highs = torch.tensor(pairs, device=weight.device).T
    for _ in range(SWEEPS):
        for group in range(grouped.shape[1]):
            span, one = slice(group * group_size, (group + 1) * group_size), grouped[:, group]
            now = (integers[:, group] - zeros[:, group]) * scales[:, group]
            candidates = grid_between(low[:, group] * lows, high[:, group] * highs, bits, symmetric)
            chosen = best_spans(one, now, pull[:, span], moment[span, span], *candidates, 2**bits - 1)[:, None]
            scale, zero = (part.gather(1, chosen.clamp(min=0)) for part in candidates)
            rounded = round_to(one, scale, zero, bits)
            pull += torch.where(chosen < 0, 0, (rounded - zero) * scale - now) @ moment[span]
            for kept, new in ((scales, scale), (zeros, zero), (integers, rounded)):
                kept[:, group] = torch.where(chosen < 0, kept[:, group], new)
    return choose_rows(weight, moment, plain, made())
