"""Gold items scored by a model: by log-likelihoods in batches, or by the text that it generates."""

from typing import NamedTuple, Protocol

import numpy as np

from quantline.errors import Failure, StageError
from quantline.metrics.gold_set import GoldResult, TokenizedItem
from quantline.run.bounded_call import pattern_in
from quantline.run.progress import counting, progress

BATCH_TOKENS = 4096
BATCH_VALUES = 1 << 27  # log-probabilities of a batch: half a gigabyte

Pair = tuple[list[int], list[int]]  # a context, of one token at least, and a continuation


class ScoringModel(Protocol):
    """The part of a runtime (quantline.runtimes.runtime.Runtime) that scoring needs."""

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Return natural log-probabilities float32 [b, n, V] of the token after each token."""

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        """Decode greedily; return the new tokens without the stop token."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""


class ContinuationScore(NamedTuple):
    """What a model makes of a continuation of m tokens.

    Attributes:
        logprobs: Natural log-likelihood of each of its tokens, float32 [m].
        greedy: The most probable token at each of its positions, [m].
    """

    logprobs: np.ndarray
    greedy: list[int]


def score_items(model: ScoringModel, items: list[TokenizedItem]) -> list[GoldResult]:
    """Score gold items, in their order.

    Raises:
        StageError: non_finite, for a log-likelihood that is NaN or infinite.
    """
    pairs = []
    for item in items:
        pairs += [(item.prompt, tokens) for tokens in item.continuations]
    remaining = iter(score_continuations(model, pairs))
    scores = []
    for item in items:
        own = [next(remaining) for _ in item.continuations]
        _check_finite(item, own)
        scores.append(own)
    results = []
    own_scores = zip(items, scores, strict=True)
    for item, own in progress(own_scores, "answers", "question", len(items)):
        if item.kind == "generated":
            results.append(_score_generated(model, item))
        elif item.kind == "choices":
            results.append(_score_choices(model, item, own))
        else:
            results.append(_score_forced(model, item, own[0]))
    return results


def score_continuations(model: ScoringModel, pairs: list[Pair]) -> list[ContinuationScore]:
    """Score the continuation of each pair of a context and a continuation.

    Sequences of like length are run together, padded on the right, which changes nothing for a
    causal model.
    """
    # The last token is not run.
    lengths = [len(context) + len(continuation) - 1 for context, continuation in pairs]
    order = sorted(range(len(pairs)), key=lambda index: (lengths[index], index))
    scores: dict[int, ContinuationScore] = {}
    start = 0
    # Tokens run at once: the first batch, of one sequence, shows how large the vocabulary is.
    most_tokens = 0
    with counting("questions", "answer", len(pairs)) as advance:
        while start < len(order):
            end = start + 1
            while end < len(order) and lengths[order[end]] * (end + 1 - start) <= most_tokens:
                end += 1
            batch = order[start:end]
            tokens = np.zeros((len(batch), lengths[batch[-1]]), np.int32)
            for row, index in zip(tokens, batch, strict=True):
                context, continuation = pairs[index]
                row[: lengths[index]] = (context + continuation)[: lengths[index]]
            logprobs = model.logprobs(tokens)
            for row, index in zip(logprobs, batch, strict=True):
                context, continuation = pairs[index]
                after = row[len(context) - 1 : lengths[index]]
                likelihoods = after[np.arange(len(continuation)), continuation]
                scores[index] = ContinuationScore(likelihoods, after.argmax(-1).tolist())
            advance(end - start)
            start = end
            most_tokens = min(BATCH_TOKENS, BATCH_VALUES // logprobs.shape[-1])
    return [scores[index] for index in range(len(pairs))]


def first_stop(text: str, stops: list[str]) -> str:
    """Return the text up to the first of some stops."""
    positions = [text.find(stop) for stop in stops]
    end = min((position for position in positions if position >= 0), default=len(text))
    return text[:end]


def _mean_likelihood(score: ContinuationScore) -> float:
    """Return a continuation's log-likelihood per token."""
    return float(score.logprobs.mean(dtype=np.float64))


def _check_finite(item: TokenizedItem, scores: list[ContinuationScore]) -> None:
    for score in scores:
        likelihood = _mean_likelihood(score)
        if not np.isfinite(likelihood):
            raise StageError(
                Failure.NON_FINITE,
                f"expected finite log-likelihoods, found {likelihood} for gold item {item.id}; "
                "look at the recipe of this variant",
            )


def _score_choices(
    model: ScoringModel, item: TokenizedItem, scores: list[ContinuationScore]
) -> GoldResult:
    """Take the choice with the greatest log-likelihood, divided as the item asks."""
    likelihoods = [_mean_likelihood(score) for score in scores]
    compared = [
        likelihood * len(tokens) / divisor
        for likelihood, tokens, divisor in zip(
            likelihoods, item.continuations, item.divisors, strict=True
        )
    ]
    best = int(np.argmax(compared))
    text = model.decode(item.continuations[best])
    return GoldResult(item.id, item.task, best == item.answer, likelihoods, text)


def _score_forced(model: ScoringModel, item: TokenizedItem, score: ContinuationScore) -> GoldResult:
    """Check whether greedy decoding gives the answer.

    It does if each token of the answer is the most probable one after those before it.
    """
    answer = item.continuations[item.answer]
    likelihood = _mean_likelihood(score)
    for position, (greedy, wanted) in enumerate(zip(score.greedy, answer, strict=True)):
        if greedy != wanted:
            text = model.decode(score.greedy[: position + 1]) + "…"
            return GoldResult(item.id, item.task, False, [likelihood], text)
    return GoldResult(item.id, item.task, True, [likelihood], model.decode(answer))


def _score_generated(model: ScoringModel, item: TokenizedItem) -> GoldResult:
    """Compare what greedy decoding writes, up to the first stop, with the answer."""
    ids = model.generate(item.prompt, item.max_tokens, set(item.end or ()))
    text = first_stop(model.decode(ids), item.stop or [])
    return GoldResult(item.id, item.task, _matches(item, text), [], text)


def _matches(item: TokenizedItem, text: str) -> bool:
    """Whether a generated text is the right answer, as the item says."""
    if item.match == "contains":
        return item.reference in text
    if item.match == "regex":
        return pattern_in(item.reference, text)
    return text.strip() == item.reference.strip()
