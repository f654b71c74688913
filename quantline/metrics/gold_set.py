"""The gold set: questions with known answers, one JSON object a line.

An item has an `answer` and a `prompt`, or chat `messages` that go through the model's template.
With `choices` it counts when its answer is the most likely of them. Without, it counts when greedy
decoding gives its answer: token by token, or, with `match`, `stop` or `max_tokens`, in the text
that is generated.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from quantline.errors import Failure, Reason, StageError

# A task's accuracy is the metric gold_<task>, so these names are taken.
RESERVED_TASKS = (
    "all",
    "accuracy",
    "accuracy_delta",
    "accuracy_se",
    "accuracy_interval",
    "accuracy_delta_se",
    "accuracy_delta_interval",
    "flips",
    "lost",
    "won",
    "items",
    "p_value",
    "tasks",
)
MAX_TOKENS = 64  # of an answer that is generated, where the item does not say

Text = Annotated[str, StringConstraints(min_length=1)]
Kind = Literal["choices", "forced", "generated"]


class Strict(BaseModel):
    """A part of an item: no unknown keys, no changes, and no number where a text is expected."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Message(Strict):
    """A message of a chat."""

    role: Text
    content: str


class GoldItem(Strict):
    """One question.

    Attributes:
        id: Of the item; each needs its own.
        prompt: The question. It may be left out where there are `messages`: it is then the content
            of the last one.
        answer: The right answer.
        task: The group of items that it is counted with.
        choices: Answers to choose from.
        messages: A chat that ends with the question.
        normalize: What the log-likelihood of a choice is divided by: its number of tokens, its
            number of characters, or nothing.
        match: How a generated text is compared with the answer.
        stop: Texts at which a generated answer ends.
        max_tokens: Of a generated answer.
    """

    id: Text
    prompt: str = ""
    answer: Text
    task: Text = "gold"
    choices: Annotated[list[Text], Field(min_length=2)] | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    normalize: Literal["tokens", "length", "none"] = "tokens"
    match: Literal["exact", "contains", "regex"] = "exact"
    stop: list[Text] | None = None
    max_tokens: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _prompt_of_messages(cls, values: object) -> object:
        if not isinstance(values, dict) or "prompt" in values:
            return values
        messages = values.get("messages")
        if not isinstance(messages, list):
            return values
        last = messages[-1] if messages else None
        return values | {"prompt": last.get("content") if isinstance(last, dict) else None}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.prompt:
            raise ValueError("prompt is empty")
        if self.choices is not None:
            self._check_choices(self.choices)
        elif self.normalize != "tokens":
            raise ValueError("normalize goes with choices")
        if self.match == "regex":
            try:
                re.compile(self.answer)
            except re.error as error:
                raise ValueError(f"the answer is no regular expression: {error}") from None
        if self.task in RESERVED_TASKS:
            raise ValueError(
                f"{self.task!r} names a figure of all tasks; the task needs another name"
            )
        return self

    def _check_choices(self, choices: list[str]) -> None:
        if self.answer not in choices or len(set(choices)) < len(choices):
            raise ValueError(
                f"the answer {self.answer!r} is to be among the choices, and each choice once"
            )
        if self.generated:
            raise ValueError(
                "an item with choices is not generated: it has no match, stop and max_tokens"
            )

    @property
    def generated(self) -> bool:
        """Whether the answer is looked for in a text that the model writes."""
        return self.match != "exact" or self.stop is not None or self.max_tokens is not None

    @property
    def kind(self) -> Kind:
        """How the item is scored."""
        if self.choices:
            return "choices"
        return "generated" if self.generated else "forced"

    @property
    def chat(self) -> list[dict[str, str]] | None:
        """The messages as plain dictionaries, if there are any."""
        if not self.messages:
            return None
        return [message.model_dump() for message in self.messages]


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


def load_gold(path: Path) -> list[GoldItem]:
    """Read the items of a JSONL file.

    Raises:
        StageError: dataset_invalid, with the number of a bad line.
    """
    try:
        # Not splitlines: a JSON string may hold U+2028 and its like as they are.
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(
            Failure.DATASET_INVALID,
            f"expected a gold set at {path}: {error}; give the path of a JSONL file in UTF-8",
            Reason.EVAL_DATASET_MISSING,
        ) from error
    items: list[GoldItem] = []
    ids: set[str] = set()
    for number, line in enumerate(lines, 1):
        try:
            item = GoldItem.model_validate(json.loads(line))
        except ValidationError as error:
            problems = "; ".join(_explain(problem) for problem in error.errors())
            raise _bad_line(path, number, problems) from None
        except (ValueError, RecursionError) as error:
            raise _bad_line(path, number, str(error)) from None
        if item.id in ids:
            raise _bad_line(path, number, f"the id {item.id!r} again; each item needs its own")
        ids.add(item.id)
        items.append(item)
    return items


def _explain(problem: Mapping[str, Any]) -> str:
    """Return one of pydantic's problems as "key: what is wrong"."""
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    return f"{'.'.join(str(part) for part in problem['loc'])}: {message}"


def _bad_line(path: Path, number: int, problem: str) -> StageError:
    optional = sorted(set(GoldItem.model_fields) - {"id", "prompt", "answer", "messages"})
    return StageError(
        Failure.DATASET_INVALID,
        f"{path} line {number}: expected one JSON object with id, prompt (or messages), answer, "
        f"and optionally {', '.join(optional)}; found: {problem}",
        Reason.EVAL_DATASET_MISSING,
    )


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
