"""A gold set as it is scored: questions as token ids, and a model's answers.

quantline.metrics.gold_items has the questions as people write them.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

MAX_TOKENS = 64  # of an answer that is generated, where the item does not say

Kind = Literal["choices", "forced", "generated"]


@dataclass(frozen=True)
class TokenizedItem:
    """A question as token ids, with what it takes to score it and to show it.

    Attributes:
        id: Of the item.
        task: The group of items that it is counted with.
        text: The prompt as the model reads it.
        reference: The right answer, or the expression that it matches.
        kind: How it is scored: by choices, along the answer's tokens, or by a generated text.
        prompt: Token ids of the prompt.
        continuations: Token ids of the choices, or of the answer alone; none if it is generated.
        answer: Which continuation is right.
        divisors: What the log-likelihood of each continuation is divided by.
        match: How a generated text is compared with the answer.
        stop: Texts at which a generated answer ends.
        max_tokens: Of a generated answer.
        end: Tokens that end a generated answer.
    """

    id: str
    task: str
    text: str
    reference: str
    kind: Kind
    prompt: list[int]
    continuations: list[list[int]]
    answer: int
    divisors: list[int]
    match: str = "exact"
    stop: list[str] | None = None
    max_tokens: int = MAX_TOKENS
    end: list[int] | None = None

    @property
    def longest(self) -> int:
        """The tokens that scoring it takes: the prompt, and an answer."""
        answers = [len(tokens) for tokens in self.continuations]
        return len(self.prompt) + max(answers, default=self.max_tokens)


@dataclass(frozen=True)
class GoldResult:
    """A model's answer to an item.

    Attributes:
        id: Of the item.
        task: The group of items that it is counted with.
        correct: Whether the answer counts.
        likelihoods: Natural log-likelihood per token of each continuation.
        said: What the model answered. Where an answer is followed token by token, that ends, with
            an ellipsis, at the first other token.
    """

    id: str
    task: str
    correct: bool
    likelihoods: list[float]
    said: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, as JSON files hold them."""
        return asdict(self)


def accuracy(results: list[GoldResult]) -> dict[str, float]:
    """Return the share of items that count, per task and, under "all", over all of them.

    It is empty without items.
    """
    tasks: dict[str, list[bool]] = {}
    for result in results:
        tasks.setdefault(result.task, []).append(result.correct)
        tasks.setdefault("all", []).append(result.correct)
    return {task: sum(correct) / len(correct) for task, correct in sorted(tasks.items())}


def read_tokenized(path: Path) -> list[TokenizedItem]:
    """Read items as the reference stage wrote them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [TokenizedItem(**json.loads(line)) for line in lines]
