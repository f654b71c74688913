"""Gold items scored in a runtime: by log-likelihoods in batches, or by the text that it generates."""

import re
from typing import Protocol

import numpy as np

from stages.metrics.gold import GoldResult, TokenizedItem
from stages.tracking import Failure, StageError

BATCH_TOKENS = 4096


class Model(Protocol):
    """The part of a runtime (stages/runtimes) that scoring needs."""

    def logprobs(self, tokens: np.ndarray) -> np.ndarray: ...
    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


def score(model: Model, items: list[TokenizedItem]) -> list[GoldResult]:
    """Score items, in their order. Raises StageError(non_finite) for a log-likelihood that is NaN or infinite."""
    found = _follow(model, items)
    return [_generated(model, item) if item.kind == "generated" else
            _chosen(model, item, found[index]) if item.kind == "choices" else _forced(model, item, found[index][0])
            for index, item in enumerate(items)]


def _follow(model: Model, items: list[TokenizedItem]) -> list[list[tuple[float, list[int]]]]:
    """Per item and continuation: log-likelihood per token, and the most probable token at each of its places.

    Sequences of like length are run together, padded on the right, which changes nothing for a causal model.
    """
    jobs = sorted((len(item.prompt) + len(tokens), index, which)
                  for index, item in enumerate(items) for which, tokens in enumerate(item.continuations))
    found: list[list] = [[None] * len(item.continuations) for item in items]
    start = 0
    while start < len(jobs):
        longest, end = jobs[start][0], start + 1
        while end < len(jobs) and jobs[end][0] * (end + 1 - start) <= BATCH_TOKENS:
            longest, end = jobs[end][0], end + 1
        tokens = np.zeros((end - start, longest), np.int32)
        for row, (length, index, which) in enumerate(jobs[start:end]):
            tokens[row, :length] = items[index].prompt + items[index].continuations[which]
        values = model.logprobs(tokens)
        for row, (length, index, which) in enumerate(jobs[start:end]):
            begin = len(items[index].prompt)
            after, wanted = values[row, begin - 1:length - 1], tokens[row, begin:length]
            likelihood = float(after[np.arange(len(wanted)), wanted].mean(dtype=np.float64))
            if not np.isfinite(likelihood):
                raise StageError(Failure.NON_FINITE, f"gold item {items[index].id} has the log-likelihood {likelihood}")
            found[index][which] = likelihood, after.argmax(-1).tolist()
        start = end
    return found


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
