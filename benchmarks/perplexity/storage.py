"""What llama-perplexity's 16-bit storage of the reference does to its figures.

Per position the tool stores log-probabilities as 65536 even steps over the span of its logits, at
most 16 nats below the greatest, in float32 arithmetic (perplexity.cpp, `log_softmax` with
`uint16_t * log_prob`). So each differs from the true one, l, by at most half a step,
δ <= 16 / 65535 / 2 = 1.2e-4, and those at or below -16 are left out of the sum. With p = exp(l) and
l' the variant's log-probability, a token's divergence Σ p (l - l') then moves by at most

    Σ p ((exp(δ) - 1) |l - l'| + exp(δ) δ) + Σ over l <= -16 + δ of p |l - l'|.
"""

from pathlib import Path

import numpy as np
from safetensors import safe_open
from scipy.special import log_softmax

from quantline.files import read_json
from quantline.model.output_head import open_head
from quantline.runtimes.runtime import logit_chunks, open_runtime

SPAN = np.float32(16)  # nats below the greatest logit that are stored
STEPS = np.float32(65535)
LOWEST = -16.0  # log-probabilities at or below it are left out of the tool's sum
ROUNDING = 4e-6  # of the tool's float32 sums of values up to 32, which are rounded to 2^-19 twice
POSITIONS_AT_ONCE = 64
QUANTILES = {"p999_kld": 0.999, "p99_kld": 0.99, "median_kld": 0.5}

Values = dict[str, np.ndarray]  # name → one number per position


def store_logprobs(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities as the tool reads them back.

    Args:
        logits: Of the reference, float32 [n, V].

    Returns:
        The log-probabilities float32 [n, V], and the step between two of them float32 [n].
    """
    high = logits.max(-1, keepdims=True)
    low = np.maximum(logits.min(-1, keepdims=True), high - SPAN)
    total = np.exp(logits - high).sum(-1, keepdims=True, dtype=np.float64)
    log_sum = np.log(total).astype(np.float32)
    step = (high - low) / STEPS
    counts = np.where(logits > low, np.rint((logits - low) / step), 0).astype(np.float32)
    return step * counts + (low - high - log_sum), step[:, 0]


def figures_after_storage(bundle: Path, reference: Path, first: int) -> dict[str, dict[str, float]]:
    """Measure a bundle as if our reference had been stored by the tool.

    Args:
        bundle: With a GGUF file.
        reference: Our reference's folder.
        first: Position in each sequence after which tokens count.

    Returns:
        {figures: ours with that reference, bound: how far storage can move each figure}.
    """
    head = open_head(reference, read_json(reference / "reference.json"))
    runtime = open_runtime("llama.cpp", bundle)
    chunks: list[Values] = []
    with safe_open(reference / "hidden.safetensors", "np") as file:
        tokens = file.get_tensor("tokens")
        hidden = file.get_slice("hidden")
        for rows, positions, logits in logit_chunks(runtime, tokens, first, tokens.shape[1] - 1):
            following = tokens[rows, positions.start + 1 : positions.stop + 1].reshape(-1)
            states = hidden[rows, positions].reshape(len(following), -1)
            variant = logits.reshape(len(following), -1)
            for start in range(0, len(following), POSITIONS_AT_ONCE):
                part = slice(start, start + POSITIONS_AT_ONCE)
                own = head.logits(states[part])
                chunks.append(_values_of_positions(own, variant[part], following[part]))
    return _summarize(
        {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    )


def _values_of_positions(
    logits: np.ndarray, variant_logits: np.ndarray, following: np.ndarray
) -> Values:
    """Compare some positions with the reference as the tool stores it.

    Args:
        logits: Of the unquantized model, float32 [n, V].
        variant_logits: Of the variant, float32 [n, V].
        following: Ids of the tokens that follow, [n].

    Returns:
        Values that figures are made of, and bounds on what storage moves them by.
    """
    stored, step = store_logprobs(logits)
    true = log_softmax(logits.astype(np.float64), axis=-1)
    variant = log_softmax(variant_logits.astype(np.float64), axis=-1)
    rows = np.arange(len(following))
    p = np.exp(true)
    distance = np.abs(true - variant)
    largest_error = step.astype(np.float64)[:, None] / 2 + ROUNDING
    counted = stored > LOWEST
    divergence = np.where(counted, np.exp(stored.astype(np.float64)) * (stored - variant), 0)
    moved = p * (np.expm1(largest_error) * distance + np.exp(largest_error) * largest_error)
    left_out = p * distance * (true <= LOWEST + largest_error)

    p_following = p[rows, following]
    true_following = true[rows, following]
    stored_following = stored[rows, following]
    variant_following = variant[rows, following]
    # A token below the stored span is lifted to its lower end.
    below_span = true_following < stored.min(-1)
    lifted = np.maximum(stored - true, 0)[rows, following] * below_span
    following_error = largest_error[:, 0] + lifted
    delta_p = np.exp(variant_following) - np.exp(stored_following.astype(np.float64))

    highest = np.sort(logits, axis=-1)
    margin = highest[:, -1] - highest[:, -2]
    return {
        "kld": divergence.sum(-1),
        "kld_bound": moved.sum(-1) + left_out.sum(-1),
        "delta_p": delta_p,
        "delta_p_bound": p_following * np.expm1(following_error),
        "same_top": stored.argmax(-1) == variant_logits.argmax(-1),
        "close_top": margin <= 2 * largest_error[:, 0],
        "nll": -variant_following,
        "reference_nll": -stored_following.astype(np.float64),
        "reference_nll_bound": following_error,
    }


def _summarize(values: Values) -> dict[str, dict[str, float]]:
    """Return the figures and their bounds."""
    kld = np.sort(values["kld"])
    perplexity = float(np.exp(values["nll"].mean()))
    reference_perplexity = float(np.exp(values["reference_nll"].mean()))
    figures = {
        "perplexity": perplexity,
        "reference_perplexity": reference_perplexity,
        "mean_kld": float(kld.mean()),
        "max_kld": float(kld[-1]),
        "rms_delta_p": float(np.sqrt((values["delta_p"] ** 2).mean())),
        "mean_delta_p": float(values["delta_p"].mean()),
        "same_top_p": float(values["same_top"].mean()),
    }
    # An order statistic moves no further than the value that moves most.
    largest = float(values["kld_bound"].max())
    reference_bound = float(np.expm1(values["reference_nll_bound"].mean()))
    bound = {
        "perplexity": perplexity * ROUNDING,
        "reference_perplexity": reference_perplexity * reference_bound,
        "mean_kld": float(values["kld_bound"].mean()),
        "max_kld": largest,
        "rms_delta_p": float(np.sqrt((values["delta_p_bound"] ** 2).mean())) + ROUNDING,
        "mean_delta_p": float(values["delta_p_bound"].mean()) + ROUNDING,
        "same_top_p": float(values["close_top"].mean()),
    }
    for name, share in QUANTILES.items():
        figures[name] = float(np.quantile(kld, share))
        bound[name] = largest + _quantile_rounding(kld, share)
    return {"figures": figures, "bound": bound}


def _quantile_rounding(kld: np.ndarray, share: float) -> float:
    """Return how far a quantile moves since the tool finds its place in float32.

    Args:
        kld: Ascending, [n].
        share: Of the quantile.
    """
    count = len(kld)
    place = min(count - 2, int(share * (count - 1)))
    return float(np.diff(kld)[place]) * count * 2**-23
