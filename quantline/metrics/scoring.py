"""Gold items scored in a runtime: by log-likelihoods in batches, or by the text that it generates."""

import re
from typing import Protocol

import numpy as np

from quantline.metrics.gold_set import GoldResult, TokenizedItem
from quantline.errors import Failure, StageError

BATCH_TOKENS = 4096
BATCH_VALUES = 1 << 27  # log-probabilities of a batch: half a gigabyte


class Model(Protocol):
    """The part of a runtime (stages/runtimes) that scoring needs."""

    def logprobs(self, tokens: np.ndarray) -> np.ndarray: ...
    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


def score(model: Model, items: list[TokenizedItem]) -> list[GoldResult]:
    """Score items, in their order. Raises StageError(non_finite) for a log-likelihood that is NaN or infinite."""
    followed = iter(follow(model, [(item.prompt, tokens) for item in items for tokens in item.continuations]))
    found = [[_mean(item, next(followed)) for _ in item.continuations] for item in items]
    return [_generated(model, item) if item.kind == "generated" else
            _chosen(model, item, found[index]) if item.kind == "choices" else _forced(model, item, found[index][0])
            for index, item in enumerate(items)]


def follow(model: Model, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[np.ndarray, list[int]]]:
    """Per pair of a context, of one token at least, and a continuation: the natural log-likelihood of each of the
    continuation's tokens, float32, and the most probable token at each of its places.

    Sequences of like length are run together, padded on the right, which changes nothing for a causal model.
    """
    lengths = [len(context) + len(continuation) - 1 for context, continuation in pairs]  # the last token is not run
    jobs = sorted(range(len(pairs)), key=lambda job: (lengths[job], job))
    found: list = [None] * len(pairs)
    start, most = 0, 0  # tokens run at once; the first batch, of one sequence, tells how large the vocabulary is
    while start < len(jobs):
        end = start + 1
        while end < len(jobs) and lengths[jobs[end]] * (end + 1 - start) <= most:
            end += 1
        batch = jobs[start:end]
        tokens = np.zeros((len(batch), lengths[batch[-1]]), np.int32)
        for row, job in zip(tokens, batch, strict=True):
            row[:lengths[job]] = (pairs[job][0] + pairs[job][1])[:lengths[job]]
        values = model.logprobs(tokens)
        for row, job in zip(values, batch, strict=True):
            context, continuation = pairs[job]
            after = row[len(context) - 1:lengths[job]]
            found[job] = after[np.arange(len(continuation)), continuation], after.argmax(-1).tolist()
        start, most = end, min(BATCH_TOKENS, BATCH_VALUES // values.shape[-1])
    return found


def _mean(item: TokenizedItem, found: tuple[np.ndarray, list[int]]) -> tuple[float, list[int]]:
    """A continuation's log-likelihood per token, and the most probable tokens."""
    likelihood = float(found[0].mean(dtype=np.float64))
    if not np.isfinite(likelihood):
        raise StageError(Failure.NON_FINITE, f"gold item {item.id} has the log-likelihood {likelihood}")
    return likelihood, found[1]


def _chosen(model: Model, item: TokenizedItem, found: list[tuple[float, list[int]]]) -> GoldResult:
    """The choice with the greatest log-likelihood, divided as the item asks."""
    likelihoods = [likelihood for likelihood, _ in found]
    best = int(np.argmax([likelihood * len(tokens) / divisor for likelihood, tokens, divisor
                          in zip(likelihoods, item.continuations, item.divisors, strict=True)]))
    return GoldResult(item.id, item.task, best == item.answer, likelihoods, model.decode(item.continuations[best]))


def _forced(model: Model, item: TokenizedItem, found: tuple[float, list[int]]) -> GoldResult:
    """Greedy decoding gives the answer if each of its tokens is the most probable after those before it."""
    likelihood, greedy = found
    wanted = item.continuations[item.answer]
    wrong = next((place for place, pair in enumerate(zip(greedy, wanted, strict=True)) if pair[0] != pair[1]), None)
    said = model.decode(wanted) if wrong is None else model.decode(greedy[:wrong + 1]) + "…"
    return GoldResult(item.id, item.task, wrong is None, [likelihood], said)


def _generated(model: Model, item: TokenizedItem) -> GoldResult:
    """What greedy decoding writes, up to the first stop, held against the answer."""
    text = model.decode(model.generate(item.prompt, item.max_tokens, set(item.end or ())))
    said = text[:min([place for stop in item.stop or () if (place := text.find(stop)) >= 0], default=len(text))]
    correct = {"exact": said.strip() == item.reference.strip(), "contains": item.reference in said,
               "regex": item.match == "regex" and re.search(item.reference, said) is not None}[item.match]
    return GoldResult(item.id, item.task, correct, [], said)
