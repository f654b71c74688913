"""How far a variant's next-token distributions are from the full-precision model's.

The definitions are those of llama.cpp's `perplexity` tool with --kl-divergence: per token, KL(P || Q) with P the
reference; whether both have the same top token; the difference of the probability of the token that follows (Δp).
The reference is exact: its logits are the stored final hidden states times the output head, made again block by block of
the vocabulary, so that no token's whole distribution is held. All in natural logarithms.

The standard error of a mean is the sample's standard deviation over the square root of the number of tokens, that of a
function of means follows by the delta method, and that of a quantile is Maritz and Jarrett's (1978). The greatest
divergence is of these tokens alone and has none.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from scipy.special import betainc
from threadpoolctl import ThreadpoolController

from quantline.model.output_head import OutputHead
from quantline.metrics.softmax import block_sums, merged, normalizers
from quantline.errors import Failure, StageError

QUANTILES = {"median_kld": 0.5, "p99_kld": 0.99, "p999_kld": 0.999}


def mean_se(values: np.ndarray) -> float:
    """Standard error of the mean of `values` [n], for n > 1."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def quantile_se(ordered: np.ndarray, share: float) -> float:
    """Standard error of the `share` quantile of `ordered` [n], ascending (Maritz and Jarrett, JASA 73, 1978).

    The quantile is an order statistic, whose place among the values is beta distributed.
    """
    n = len(ordered)
    weights = np.diff(betainc((n + 1) * share, (n + 1) * (1 - share), np.arange(n + 1) / n))
    centre = weights @ ordered
    return float(np.sqrt(weights @ (ordered - centre) ** 2))


@dataclass
class Divergence:
    """Collects per-token figures piece by piece; `summary` gives the metrics."""

    head: OutputHead
    kld: list[np.ndarray] = field(default_factory=list)
    same_top: list[np.ndarray] = field(default_factory=list)
    delta_p: list[np.ndarray] = field(default_factory=list)
    nll: list[np.ndarray] = field(default_factory=list)
    reference_nll: list[np.ndarray] = field(default_factory=list)
    blas: ThreadpoolController = field(default_factory=ThreadpoolController)

    def add(self, hidden: np.ndarray, logits: np.ndarray, following: np.ndarray) -> None:
        """n tokens: reference hidden float32 [n, D], the variant's logits or log-probabilities float32 [n, V] over its whole
        vocabulary, of which the first are the reference's, and the ids [n] of the tokens that follow.

        Threads share the blocks of the vocabulary, and each multiplies matrices alone: threads of BLAS go on spinning after a
        product, and take the time of the runtime's.
        """
        rows, threads = np.arange(len(following)), os.cpu_count()
        with self.blas.limit(limits=1), ThreadPoolExecutor(threads) as pool:
            parts = [part for part in np.array_split(logits, threads) if len(part)]
            log_sum, its_top = map(np.concatenate, zip(*pool.map(normalizers, parts), strict=True))
            blocks = pool.map(lambda tokens: self._block(hidden, logits, following, tokens), self.head.blocks())
            high, top, total, weighted, wanted = map(np.stack, zip(*blocks, strict=True))
        normalizer, mean, best = merged(high, total, weighted)
        p, q = wanted.sum(0) - normalizer, logits[rows, following] - log_sum
        self.kld.append(np.maximum(mean - normalizer + log_sum, 0))  # rounding may leave less; NaN stays
        self.same_top.append(top[best, rows] == its_top)
        self.delta_p.append(np.exp(q) - np.exp(p))
        self.nll.append(-q)
        self.reference_nll.append(-p)

    def _block(self, hidden: np.ndarray, logits: np.ndarray, following: np.ndarray, tokens: slice) -> tuple[np.ndarray, ...]:
        """What `add` needs of some tokens of the vocabulary: the greatest of the reference's logits, its token, and the sums
        of `block_sums`; and the logit of the token that follows, 0 where it is none of these tokens.
        """
        block = self.head.block(hidden, tokens)
        high, top, total, weighted = block_sums(block, logits[:, tokens])
        place = following - tokens.start
        here = (place >= 0) & (place < block.shape[1])
        wanted = np.where(here, block[np.arange(len(block)), np.where(here, place, 0)], 0)
        return high, top + tokens.start, total, weighted, wanted.astype(np.float64)

    def summary(self) -> dict[str, float]:
        """The metrics. Raises StageError(non_finite) if one of them is NaN or infinite."""
        with np.errstate(invalid="ignore"):
            metrics = self._metrics()
        broken = sorted(name for name, value in metrics.items() if not np.isfinite(value))
        if broken:
            raise StageError(Failure.NON_FINITE, f"expected finite metrics, found {', '.join(broken)} that are not")
        return metrics

    def _metrics(self) -> dict[str, float]:
        kld, nll = np.sort(np.concatenate(self.kld)), np.concatenate(self.nll)
        base, delta_p = np.concatenate(self.reference_nll), np.concatenate(self.delta_p)
        same = float(np.concatenate(self.same_top).mean())
        ours, theirs, n = float(np.exp(nll.mean())), float(np.exp(base.mean())), len(kld)
        rms = float(np.sqrt((delta_p**2).mean()))
        return {
            "perplexity": ours, "perplexity_se": ours * mean_se(nll),
            "perplexity_delta": ours - theirs, "perplexity_delta_se": mean_se(ours * nll - theirs * base),
            "mean_kld": float(kld.mean()), "mean_kld_se": mean_se(kld),
            **{key: float(np.quantile(kld, share)) for key, share in QUANTILES.items()},
            **{f"{key}_se": quantile_se(kld, share) for key, share in QUANTILES.items()}, "max_kld": float(kld[-1]),
            "mean_delta_p": float(delta_p.mean()), "mean_delta_p_se": mean_se(delta_p),
            "rms_delta_p": rms, "rms_delta_p_se": mean_se(delta_p**2) / (2 * rms) if rms else 0.0,
            "same_top_p": same, "same_top_p_se": float(np.sqrt(same * (1 - same) / (n - 1))), "tokens": n,
        }
