"""How far a variant's next-token distributions are from the full-precision model's.

The definitions are those of llama.cpp's `perplexity` tool with --kl-divergence: per token, KL(P || Q) with P the
reference; whether both have the same top token; the difference of the probability of the token that follows (Δp).
The reference is exact: its logits are the stored final hidden states times the output head. All in natural logarithms;
a standard error is the sample's standard deviation over the square root of the number of tokens.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy.special import log_softmax

from stages.tracking import Failure, StageError

CHUNK_VALUES = 1 << 24  # logits held at once, so that a large vocabulary needs no gigabytes


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
        kld, nll = np.concatenate(self.kld), np.concatenate(self.nll)
        base, delta_p = np.concatenate(self.reference_nll), np.concatenate(self.delta_p)
        ours, theirs, n = float(np.exp(nll.mean())), float(np.exp(base.mean())), len(kld)
        # Delta method for a difference of exponentials of means over the same tokens.
        delta_se = (ours * nll - theirs * base).std(ddof=1) / np.sqrt(n)
        metrics = {
            "perplexity": ours, "perplexity_delta": ours - theirs, "perplexity_delta_se": float(delta_se),
            "mean_kld": float(kld.mean()), "mean_kld_se": float(kld.std(ddof=1) / np.sqrt(n)),
            "median_kld": float(np.median(kld)), "p99_kld": float(np.quantile(kld, 0.99)),
            "p999_kld": float(np.quantile(kld, 0.999)), "max_kld": float(kld.max()),
            "rms_delta_p": float(np.sqrt((delta_p**2).mean())),
            "same_top_p": float(np.concatenate(self.same_top).mean()), "tokens": n,
        }
        broken = sorted(name for name, value in metrics.items() if not np.isfinite(value))
        if broken:
            raise StageError(Failure.NON_FINITE, f"expected finite metrics, found {', '.join(broken)} that are not")
        return metrics
