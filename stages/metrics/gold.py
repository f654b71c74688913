"""The gold set: questions with known answers, scored by log-probabilities alone.

An item without choices counts when greedy decoding gives its answer: every answer token is the most probable one after
the prompt and the answer before it. An item with choices counts when its answer has the highest log-likelihood per
token among them. One pass serves both, in any runtime.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from stages.tracking import Failure, Reason, StageError

BATCH_TOKENS = 4096
# A task's accuracy is the metric gold_<task>, so these names are taken.
RESERVED = ("all", "accuracy", "accuracy_delta", "accuracy_se", "accuracy_interval", "accuracy_delta_se",
            "accuracy_delta_interval", "flips", "lost", "won", "items", "p_value", "tasks")
LogProbs = Callable[[np.ndarray], np.ndarray]  # int32 [b, n] → float32 [b, n, V]


@dataclass(frozen=True)
class GoldItem:
    """One question. `messages`, if given, go through the chat template in place of `prompt`."""

    id: str
    prompt: str
    answer: str
    task: str = "gold"
    choices: list[str] | None = None
    messages: list[dict[str, str]] | None = None


@dataclass(frozen=True)
class TokenizedItem:
    """A question as token ids; `continuations` are the choices, or else the answer alone."""

    id: str
    task: str
    prompt: list[int]
    continuations: list[list[int]]
    answer: int  # which continuation is right
    greedy: bool  # no choices: every token has to be the most probable one


@dataclass(frozen=True)
class GoldResult:
    """What a model made of an item: natural log-likelihood per token of each continuation, and whether it counts."""

    id: str
    task: str
    correct: bool
    likelihoods: list[float]

    def as_dict(self) -> dict:
        return asdict(self)


def load_gold(path: Path) -> list[GoldItem]:
    """The items of a JSONL file. Raises StageError(dataset_invalid) with the number of a bad line."""
    try:
        # Not splitlines: a JSON string may hold U+2028 and its like as they are.
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise StageError(Failure.DATASET_INVALID, f"expected a gold set at {path}: {error}",
                         Reason.EVAL_DATASET_MISSING) from error
    items, ids = [], set()
    for number, line in enumerate(lines, 1):
        try:
            item = GoldItem(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise _bad(path, number, f"one JSON object with id, prompt, answer, and optionally task, choices, messages; "
                                     f"found: {error}") from None
        if item.id in ids:
            raise _bad(path, number, f"an id of its own, found {item.id!r} again")
        if not item.answer or (item.choices is not None and item.answer not in item.choices):
            raise _bad(path, number, f"an answer that is not empty and among the choices, found {item.answer!r}")
        if item.task in RESERVED:
            raise _bad(path, number, f"another name of the task than {item.task!r}, which names a figure of all tasks")
        ids.add(item.id)
        items.append(item)
    return items


def _bad(path: Path, number: int, what: str) -> StageError:
    return StageError(Failure.DATASET_INVALID, f"{path} line {number}: expected {what}", Reason.EVAL_DATASET_MISSING)


def score(logprobs: LogProbs, items: Iterable[TokenizedItem]) -> list[GoldResult]:
    """Score items, in their order. Sequences of like length are run together, padded on the right.

    Padding to the right changes nothing for a causal model. Raises StageError(non_finite) for NaN.
    """
    items = list(items)
    jobs = sorted((len(item.prompt) + len(tokens), index, which)
                  for index, item in enumerate(items) for which, tokens in enumerate(item.continuations))
    found: dict[tuple[int, int], tuple[float, bool]] = {}
    start = 0
    while start < len(jobs):
        longest, end = jobs[start][0], start + 1
        while end < len(jobs) and jobs[end][0] * (end + 1 - start) <= BATCH_TOKENS:
            longest, end = jobs[end][0], end + 1
        tokens = np.zeros((end - start, longest), np.int32)
        rows = []
        for row, (_, index, which) in enumerate(jobs[start:end]):
            item = items[index]
            ids = item.prompt + item.continuations[which]
            tokens[row, :len(ids)] = ids
            rows.append((index, which, len(item.prompt), len(ids)))
        values = logprobs(tokens)
        for row, (index, which, begin, stop) in enumerate(rows):
            after, wanted = values[row, begin - 1:stop - 1], tokens[row, begin:stop]
            likelihood = float(after[np.arange(len(wanted)), wanted].mean(dtype=np.float64))
            if not np.isfinite(likelihood):
                raise StageError(Failure.NON_FINITE, f"gold item {items[index].id} has the log-likelihood {likelihood}")
            found[index, which] = likelihood, bool((after.argmax(-1) == wanted).all())
        start = end
    results = []
    for index, item in enumerate(items):
        scores = [found[index, which] for which in range(len(item.continuations))]
        best = int(np.argmax([likelihood for likelihood, _ in scores]))
        correct = scores[item.answer][1] if item.greedy else best == item.answer
        results.append(GoldResult(item.id, item.task, correct, [likelihood for likelihood, _ in scores]))
    return results


def accuracy(results: list[GoldResult]) -> dict[str, float]:
    """Share of items that count, per task and, under "all", over all of them; empty without items."""
    tasks: dict[str, list[bool]] = {}
    for result in results:
        tasks.setdefault(result.task, []).append(result.correct)
        tasks.setdefault("all", []).append(result.correct)
    return {task: sum(hits) / len(hits) for task, hits in sorted(tasks.items())}


def read_tokenized(path: Path) -> list[TokenizedItem]:
    """Items as the reference stage wrote them."""
    return [TokenizedItem(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
