"""How far a variant's next-token distributions are from the full-precision model's.

The definitions are those of llama.cpp's `perplexity` tool with --kl-divergence: per token, KL(P || Q) with P the
reference; whether both have the same top token; the difference of the probability of the token that follows (Δp).
The reference is exact: its logits are the stored final hidden states times the output head. All in natural logarithms.

The standard error of a mean is the sample's standard deviation over the square root of the number of tokens, that of a
function of means follows by the delta method, and that of a quantile is Maritz and Jarrett's (1978). The greatest
divergence is of these tokens alone and has none.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy.special import betainc, log_softmax

from stages.tracking import Failure, StageError

CHUNK_VALUES = 1 << 24  # logits held at once, so that a large vocabulary needs no gigabytes
QUANTILES = {"median_kld": 0.5, "p99_kld": 0.99, "p999_kld": 0.999}


@dataclass(frozen=True)
class OutputHead:
    """weight float32 [V, hidden], and what some families do to the logits."""

    weight: np.ndarray
    scale: float = 1.0
    softcap: float | None = None

    def logprobs(self, hidden: np.ndarray) -> np.ndarray:
        """Natural log-probabilities float32 [n, V] for final hidden states [n, hidden]."""
        logits = (hidden @ self.weight.T) * np.float32(self.scale)
        if self.softcap:
            logits = np.tanh(logits / self.softcap) * np.float32(self.softcap)
        return log_softmax(logits, axis=-1)


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
    """Collects per-token figures sequence by sequence; `summary` gives the metrics."""

    head: OutputHead
    kld: list[np.ndarray] = field(default_factory=list)
    same_top: list[np.ndarray] = field(default_factory=list)
    delta_p: list[np.ndarray] = field(default_factory=list)
    nll: list[np.ndarray] = field(default_factory=list)
    reference_nll: list[np.ndarray] = field(default_factory=list)

    def add(self, hidden: np.ndarray, logprobs: np.ndarray, tokens: np.ndarray) -> None:
        """One sequence: reference hidden [n, D], the variant's log-probabilities [n, V], token ids [n]."""
        step = max(1, CHUNK_VALUES // self.head.weight.shape[0])
        following = tokens[1:]
        for start in range(0, len(following), step):
            rows = slice(start, min(start + step, len(following)))
            wanted, count = following[rows], np.arange(rows.stop - start)
            p, q = self.head.logprobs(hidden[rows]), logprobs[rows]
            self.kld.append((np.exp(p) * (p - q)).sum(-1, dtype=np.float64))
            self.same_top.append(p.argmax(-1) == q.argmax(-1))
            p, q = p[count, wanted].astype(np.float64), q[count, wanted].astype(np.float64)
            self.delta_p.append(np.exp(q) - np.exp(p))
            self.nll.append(-q)
            self.reference_nll.append(-p)

    def summary(self) -> dict[str, float]:
        """The metrics. Raises StageError(non_finite) if one of them is NaN or infinite."""
        kld, nll = np.sort(np.concatenate(self.kld)), np.concatenate(self.nll)
        base, delta_p = np.concatenate(self.reference_nll), np.concatenate(self.delta_p)
        same = float(np.concatenate(self.same_top).mean())
        ours, theirs, n = float(np.exp(nll.mean())), float(np.exp(base.mean())), len(kld)
        rms = float(np.sqrt((delta_p**2).mean()))
        metrics = {
            "perplexity": ours, "perplexity_se": ours * mean_se(nll),
            "perplexity_delta": ours - theirs, "perplexity_delta_se": mean_se(ours * nll - theirs * base),
            "mean_kld": float(kld.mean()), "mean_kld_se": mean_se(kld),
            **{key: float(np.quantile(kld, share)) for key, share in QUANTILES.items()},
            **{f"{key}_se": quantile_se(kld, share) for key, share in QUANTILES.items()}, "max_kld": float(kld[-1]),
            "mean_delta_p": float(delta_p.mean()), "mean_delta_p_se": mean_se(delta_p),
            "rms_delta_p": rms, "rms_delta_p_se": mean_se(delta_p**2) / (2 * rms) if rms else 0.0,
            "same_top_p": same, "same_top_p_se": float(np.sqrt(same * (1 - same) / (n - 1))), "tokens": n,
        }
        broken = sorted(name for name, value in metrics.items() if not np.isfinite(value))
        if broken:
            raise StageError(Failure.NON_FINITE, f"expected finite metrics, found {', '.join(broken)} that are not")
        return metrics
