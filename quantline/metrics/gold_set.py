"""The gold set: questions with known answers, one JSON object a line.

An item has an `answer` and a `prompt`, or chat `messages` that go through the model's template. With `choices` it
counts when its answer is the most likely of them. Without, it counts when greedy decoding gives its answer: token by
token, or, with `match`, `stop` or `max_tokens`, in the text that is generated.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from quantline.errors import Failure, Reason, StageError

# A task's accuracy is the metric gold_<task>, so these names are taken.
RESERVED = ("all", "accuracy", "accuracy_delta", "accuracy_se", "accuracy_interval", "accuracy_delta_se",
            "accuracy_delta_interval", "flips", "lost", "won", "items", "p_value", "tasks")
MAX_TOKENS = 64  # of an answer that is generated, where the item does not say
Text = Annotated[str, StringConstraints(min_length=1)]


class Strict(BaseModel):
    """No unknown keys, no changes, and no number where a text is expected."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Message(Strict):
    role: Text
    content: str


class GoldItem(Strict):
    """One question. `prompt` may be left out where there are `messages`: it is then the last one's content."""

    id: Text
    prompt: str = ""
    answer: Text
    task: Text = "gold"
    choices: Annotated[list[Text], Field(min_length=2)] | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    # What the log-likelihood of a choice is divided by: its number of tokens, its number of characters, or nothing.
    normalize: Literal["tokens", "length", "none"] = "tokens"
    match: Literal["exact", "contains", "regex"] = "exact"  # how a generated text is held against the answer
    stop: list[Text] | None = None  # texts at which a generated answer ends
    max_tokens: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _last_message(cls, values: object) -> object:
        if isinstance(values, dict) and "prompt" not in values and isinstance(values.get("messages"), list):
            last = values["messages"][-1] if values["messages"] else None
            return values | {"prompt": last.get("content") if isinstance(last, dict) else None}
        return values

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.prompt:
            raise ValueError("prompt is empty")
        if self.choices and (self.answer not in self.choices or len(set(self.choices)) < len(self.choices)):
            raise ValueError(f"the answer {self.answer!r} is to be among the choices, and each choice once")
        if self.choices and self.generated:
            raise ValueError("an item with choices is not generated: it has no match, stop and max_tokens")
        if not self.choices and self.normalize != "tokens":
            raise ValueError("normalize goes with choices")
        if self.match == "regex":
            try:
                re.compile(self.answer)
            except re.error as error:
                raise ValueError(f"the answer is no regular expression: {error}") from None
        if self.task in RESERVED:
            raise ValueError(f"{self.task!r} names a figure of all tasks; the task needs another name")
        return self

    @property
    def generated(self) -> bool:
        """Whether the answer is looked for in a text that the model writes."""
        return self.match != "exact" or self.stop is not None or self.max_tokens is not None

    @property
    def chat(self) -> list[dict[str, str]] | None:
        return [message.model_dump() for message in self.messages] if self.messages else None


@dataclass(frozen=True)
class TokenizedItem:
    """A question as token ids, with what it takes to score it and to show it."""

    id: str
    task: str
    text: str  # the prompt as the model reads it
    reference: str  # the right answer, or the expression that it matches
    kind: Literal["choices", "forced", "generated"]
    prompt: list[int]
    continuations: list[list[int]]  # the choices, or the answer alone; none if it is generated
    answer: int  # which continuation is right
    divisors: list[int]  # of each continuation's log-likelihood
    match: str = "exact"
    stop: list[str] | None = None
    max_tokens: int = MAX_TOKENS
    end: list[int] | None = None  # tokens that end a generated answer


@dataclass(frozen=True)
class GoldResult:
    """What a model made of an item: whether it counts, the natural log-likelihood per token of each continuation, and
    what it said. Where an answer is followed token by token, that ends, with an ellipsis, at the first other token.
    """

    id: str
    task: str
    correct: bool
    likelihoods: list[float]
    said: str = ""

    def as_dict(self) -> dict:
        return asdict(self)


def load_gold(path: Path) -> list[GoldItem]:
    """The items of a JSONL file. Raises StageError(dataset_invalid) with the number of a bad line."""
    try:
        # Not splitlines: a JSON string may hold U+2028 and its like as they are.
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(Failure.DATASET_INVALID, f"expected a gold set at {path}: {error}",
                         Reason.EVAL_DATASET_MISSING) from error
    items, ids = [], set()
    for number, line in enumerate(lines, 1):
        try:
            item = GoldItem.model_validate(json.loads(line))
        except ValidationError as error:
            raise _bad(path, number, "; ".join(map(_explain, error.errors()))) from None
        except (ValueError, RecursionError) as error:
            raise _bad(path, number, str(error)) from None
        if item.id in ids:
            raise _bad(path, number, f"the id {item.id!r} again; each item needs its own")
        ids.add(item.id)
        items.append(item)
    return items


def _explain(error: dict) -> str:
    said = error["msg"].removeprefix("Value error, ")
    return f"{'.'.join(map(str, error['loc']))}: {said}" if error["loc"] else said


def _bad(path: Path, number: int, found: str) -> StageError:
    optional = sorted(set(GoldItem.model_fields) - {"id", "prompt", "answer", "messages"})
    return StageError(Failure.DATASET_INVALID, f"{path} line {number}: expected one JSON object with id, prompt (or "
                      f"messages), answer, and optionally {', '.join(optional)}; found: {found}",
                      Reason.EVAL_DATASET_MISSING)


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
