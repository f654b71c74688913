"""The gold set: questions with known answers, one JSON object a line.

An item has an `answer` and a `prompt`, or chat `messages` that go through the model's template.
With `choices` it counts when its answer is the most likely of them. Without, it counts when greedy
decoding gives its answer: token by token, or, with `match`, `stop` or `max_tokens`, in the text
that is generated.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from quantline.errors import Failure, Reason, StageError
from quantline.metrics.gold_set import Kind
from quantline.text.documents import plain_text
from quantline.text.text_file import flaw_of, read_json_lines
from quantline.tracking.run_content import numbers

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
TASK_LENGTH = 100  # characters; MLflow takes 250 for the name of a metric

Text = Annotated[str, StringConstraints(min_length=1)]

MOST_TOKENS = 1 << 15  # of a generated answer: a model that never ends would write them all
PATTERN_LENGTH = 2000  # characters
MOST_REPETITIONS = 10_000


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
    max_tokens: Annotated[int, Field(gt=0, le=MOST_TOKENS)] | None = None
    _line: int = PrivateAttr(default=0)

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
            if len(self.answer) > PATTERN_LENGTH:
                raise ValueError(
                    f"a regular expression has {PATTERN_LENGTH} characters at most, found "
                    f"{len(self.answer)}"
                )
            # Engines write counted repetitions out, and those of repetitions fill the memory.
            counts = [int(count[:9]) for count in re.findall(r"[{,](\d+)(?=[,}])", self.answer)]
            if math.prod(max(1, count) for count in counts) > MOST_REPETITIONS:
                raise ValueError(
                    "the counts of a regular expression's repetitions multiply to "
                    f"{MOST_REPETITIONS:,} at most"
                )
            try:
                empty = re.compile(self.answer).search("")
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"the answer is no regular expression: {error}") from None
            if empty:
                raise ValueError(
                    f"the regular expression {self.answer!r:.80} is found in every text, the empty "
                    "one too, so that any answer would be right"
                )
        if self.generated and self.match != "regex":
            cut = [stop for stop in self.stop or () if stop in self.answer.strip()]
            if cut:
                raise ValueError(
                    f"the answer {self.answer!r:.80} holds the stop {cut[0]!r}, where a generated "
                    "text ends, so that none could be right"
                )
        self._check_task()
        return self

    def _check_task(self) -> None:
        """Check that a task can name a figure: in JSON, on the page, and as a metric of MLflow."""
        if self.task in RESERVED_TASKS:
            raise ValueError(
                f"{self.task!r} names a figure of all tasks; the task needs another name"
            )
        if len(self.task) > TASK_LENGTH:
            raise ValueError(
                f"a task's name has {TASK_LENGTH} characters at most, found {len(self.task)}"
            )
        if self.task != self.task.strip() or not self.task.isprintable():
            raise ValueError(
                f"a task's name has no control characters, and no blanks at its ends, found "
                f"{self.task!r}"
            )
        if any(part.strip() in ("", ".", "..") for part in self.task.split("/")):
            raise ValueError(
                f"a task's name has words between slashes, such as math/algebra, found "
                f"{self.task!r}"
            )

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
    def label(self) -> str:
        """The item's id and line, for messages."""
        return f"item {self.id!r} (line {self._line})" if self._line else f"item {self.id!r}"

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


def load_gold(path: Path) -> list[GoldItem]:
    """Read the items of a JSONL file.

    Raises:
        StageError: dataset_invalid, with all bad lines.
    """
    items: dict[str, GoldItem] = {}
    tasks: dict[str, str] = {}  # as MLflow writes them → as they are

    def read(number: int, value: Any) -> None:
        for text in _texts(value):
            if flaw := flaw_of(text):
                raise ValueError(flaw)
        try:
            item = GoldItem.model_validate(value)
        except ValidationError as error:
            problems = "; ".join(_explain(problem) for problem in error.errors())
            raise ValueError(problems) from None
        if item.id in items:
            raise ValueError(f"the id {item.id!r} again; each item needs its own")
        (metric,) = numbers({item.task: 0.0})
        other = tasks.setdefault(metric, item.task)
        if other != item.task:
            raise ValueError(
                f"the task {item.task!r}, which MLflow cannot tell from {other!r}: it writes both "
                f"as {metric!r}"
            )
        item._line = number
        items[item.id] = item

    optional = sorted(set(GoldItem.model_fields) - {"id", "prompt", "answer", "messages"})
    read_json_lines(
        path,
        read,
        "one JSON object with id, prompt (or messages), answer, and optionally "
        f"{', '.join(optional)}",
        Reason.EVAL_DATASET_MISSING,
    )
    if not items:
        raise StageError(
            Failure.DATASET_INVALID,
            f"expected questions in {path}, found none; write some, or leave evaluation.gold out",
            Reason.EVAL_DATASET_MISSING,
        )
    return list(items.values())


def prompts_of(items: list[GoldItem]) -> dict[str, str]:
    """Return id → what an item asks; of a chat, all its messages."""
    return {item.id: plain_text(item.chat) if item.chat else item.prompt for item in items}


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _explain(problem: Mapping[str, Any]) -> str:
    """Return one of pydantic's problems as "key: what is wrong"."""
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    return f"{'.'.join(str(part) for part in problem['loc'])}: {message}"
