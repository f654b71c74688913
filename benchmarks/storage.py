"""What llama-perplexity's 16-bit storage of the reference does to its figures.

Per position the tool stores log-probabilities as 65536 even steps over the span of its logits, at most 16 nats below the
greatest, in float32 arithmetic (perplexity.cpp, `log_softmax` with `uint16_t * log_prob`). So each differs from the true
one, l, by at most half a step, δ <= 16 / 65535 / 2 = 1.2e-4, and those at or below -16 are left out of the sum. With p =
exp(l) and l' the variant's log-probability, a token's divergence Σ p (l - l') then moves by at most

    Σ p ((exp(δ) - 1) |l - l'| + exp(δ) δ) + Σ over l <= -16 + δ of p |l - l'|.
"""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open
from scipy.special import log_softmax

from quantline.model.output_head import open_head
from quantline.runtimes.runtime import open_runtime, pieces

SPAN, STEPS, LEAST = np.float32(16), np.float32(65535), -16.0
FLOAT = 4e-6  # of the tool's float32 sums of values up to 32, which are rounded to 2^-19 twice


def stored(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log-probabilities float32 [n, V] as the tool reads them back, its step float32 [n]) for reference logits [n, V]."""
    high = logits.max(-1, keepdims=True)
    low = np.maximum(logits.min(-1, keepdims=True), high - SPAN)
    log_sum = np.log(np.exp(logits - high).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scale = (high - low) / STEPS
    steps = np.where(logits > low, np.rint((logits - low) / scale), 0).astype(np.float32)
    return scale * steps + (low - high - log_sum), scale[:, 0]


def stored_as_the_tool_does(bundle: Path, reference: Path, first: int) -> dict[str, dict[str, float]]:
    """`figures`: ours, had the reference been stored by the tool. `bound`: how far storage can move each figure."""
    head = open_head(reference, json.loads((reference / "reference.json").read_text(encoding="utf-8")))
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("kld", "bound", "delta", "delta_bound", "same", "close",
                                                                  "nll", "base", "base_bound")}
    runtime = open_runtime("llama.cpp", bundle)
    with safe_open(reference / "hidden.safetensors", "np") as file:
        tokens, hidden = file.get_tensor("tokens"), file.get_slice("hidden")
        for rows, places, logits in pieces(runtime, tokens, first, tokens.shape[1] - 1):
            following = tokens[rows, places.start + 1:places.stop + 1].reshape(-1)
            states = hidden[rows, places].reshape(len(following), -1)
            other = logits.reshape(len(following), -1)
            for start in range(0, len(following), 64):
                part = slice(start, start + 64)
                for name, values in _positions(head.logits(states[part]), other[part], following[part]).items():
                    columns[name].append(values)
    return _summary({name: np.concatenate(values) for name, values in columns.items()})


def _positions(logits: np.ndarray, other: np.ndarray, following: np.ndarray) -> dict[str, np.ndarray]:
    """The figures of some positions, with the reference stored by the tool, and their bounds."""
    kept, step = stored(logits)
    true, variant = (log_softmax(one.astype(np.float64), axis=-1) for one in (logits, other))
    p, apart, most = np.exp(true), np.abs(true - variant), step.astype(np.float64)[:, None] / 2 + FLOAT
    counted, taken = kept > LEAST, np.arange(len(following))
    lifted = np.maximum(kept - true, 0)[taken, following] * (true[taken, following] < kept.min(-1))  # below the stored span
    top = np.sort(logits, axis=-1)
    base, delta = kept[taken, following], np.exp(variant[taken, following])
    return {
        "kld": np.where(counted, np.exp(kept.astype(np.float64)) * (kept - variant), 0).sum(-1),
        "bound": (p * (np.expm1(most) * apart + np.exp(most) * most)).sum(-1) + (p * apart * (true <= LEAST + most)).sum(-1),
        "delta": delta - np.exp(base.astype(np.float64)), "delta_bound": p[taken, following] * np.expm1(most[:, 0] + lifted),
        "same": kept.argmax(-1) == other.argmax(-1), "close": top[:, -1] - top[:, -2] <= 2 * most[:, 0],
        "nll": -variant[taken, following], "base": -base.astype(np.float64), "base_bound": most[:, 0] + lifted,
    }


def _summary(found: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    kld, count = np.sort(found["kld"]), len(found["kld"])
    rms = float(np.sqrt((found["delta"]**2).mean()))
    ppl, base = (float(np.exp(found[name].mean())) for name in ("nll", "base"))
    quantiles = {"p999_kld": 0.999, "p99_kld": 0.99, "median_kld": 0.5}
    figures = {"perplexity": ppl, "reference_perplexity": base, "mean_kld": float(kld.mean()), "max_kld": float(kld[-1]),
               "rms_delta_p": rms, "mean_delta_p": float(found["delta"].mean()), "same_top_p": float(found["same"].mean()),
               **{name: float(np.quantile(kld, share)) for name, share in quantiles.items()}}
    most = float(found["bound"].max())  # an order statistic moves no further than the value that moves most
    # The tool finds the place of a quantile in float32.
    gaps = {name: float(np.diff(kld)[min(count - 2, int(share * (count - 1)))]) * count * 2**-23
            for name, share in quantiles.items()}
    bound = {"perplexity": ppl * FLOAT, "reference_perplexity": base * float(np.expm1(found["base_bound"].mean())),
             "mean_kld": float(found["bound"].mean()), "max_kld": most, **{name: most + gap for name, gap in gaps.items()},
             "rms_delta_p": float(np.sqrt((found["delta_bound"]**2).mean())) + FLOAT,
             "mean_delta_p": float(found["delta_bound"].mean()) + FLOAT, "same_top_p": float(found["close"].mean())}
    return {"figures": figures, "bound": bound}
