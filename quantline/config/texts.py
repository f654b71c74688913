"""The sections `calibration` and `evaluation`: which texts, and how to measure."""

from typing import Literal, Self

from pydantic import Field, model_validator

from quantline.config.section import Section
from quantline.config.variants import RuntimeName

COLUMN = "text"  # of datasets and JSON lines, where no other is named
MESSAGES = "messages"  # the column with chats, which comes before COLUMN


class Text(Section):
    """Documents from a file or a Hub dataset, packed into sequences of one length."""

    source: Literal["file", "hub"] = Field(description="Where the text comes from.")
    path: str | None = Field(default=None, description="A .txt or .jsonl file (source: file).")
    dataset: str | None = Field(default=None, description="A dataset's id (source: hub).")
    dataset_config: str | None = Field(default=None, description="Its configuration.")
    split: str | None = Field(default=None, description="Its split (source: hub).")
    column: str = Field(
        default=COLUMN,
        description="The column of a dataset, or the key in JSON lines, that holds the text or the "
        "chat messages; with the default, `messages` comes first where there is one.",
    )
    dataset_revision: str | None = Field(default=None, description="Branch, tag or commit.")
    part: tuple[float, float] = Field(
        default=(0.0, 1.0), description="Share of the documents to take, from and to."
    )
    sequences: int = Field(gt=0, description="At most so many sequences.")
    length: int = Field(gt=1, description="Tokens of a sequence.")
    watch: str = Field(description="The path whose change makes DVC read the text again.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.source == "file" and not self.path:
            raise ValueError("source file needs path")
        if self.source == "hub" and not (self.dataset and self.split):
            raise ValueError("source hub needs dataset and split")
        others = {"path": self.path}
        if self.source == "file":
            others = {"dataset": self.dataset, "split": self.split}
        for key, value in others.items():
            if value is not None:
                raise ValueError(
                    f"source {self.source} takes no {key}, found {value!r}; leave it out"
                )
        if not 0 <= self.part[0] < self.part[1] <= 1:
            raise ValueError("part needs two numbers with 0 <= from < to <= 1")
        return self


class Calibration(Text):
    """The text that statistics are collected on."""

    curvature: bool = Field(
        default=True,
        description="Also collect second moments of the output gradients, in a backward pass.",
    )
    weights: Literal["gradient", "equal"] = Field(
        default="gradient",
        description="How much a token counts in the second moments of the inputs: as much as its "
        "gradient is large, if there is a backward pass, or all alike.",
    )

    @property
    def by_gradient(self) -> bool:
        """Whether tokens count by their gradients."""
        return self.curvature and self.weights == "gradient"


class Speed(Section):
    """How speed is measured."""

    prompt_tokens: int = Field(gt=0, description="Tokens of the prompt whose prefill is timed.")
    new_tokens: int = Field(gt=1, description="Tokens whose decoding is timed.")
    repetitions: int = Field(
        gt=0, description="Timed repetitions at most, after a few tokens to warm up."
    )
    seconds: float | None = Field(
        default=None,
        gt=0,
        description="After so long no repetition beyond the third begins.",
    )
    threads: int | None = Field(
        default=None, gt=0, description="Threads of the runtime; null is one per core."
    )


class Limits(Section):
    """Bounds of each process in which a variant is tried or measured; null is no limit."""

    seconds: float | None = Field(default=14400, gt=0, description="Wall-clock time.")
    memory_mib: float | None = Field(
        default=None, gt=0, description="Resident memory of the process and its children."
    )


class Evaluation(Text):
    """The text and the questions that variants are measured on, and how."""

    gold: str | None = Field(default=None, description="Questions, as JSON lines.")
    gold_watch: str = Field(
        description="`gold`, or `watch` where there is none: DVC cannot depend on nothing."
    )
    allow_overlap: bool | list[str] = Field(
        default=False,
        description="What may stand in the calibration text too, or in both texts: ids of gold "
        "items and of documents (document-1, …), as the error names them; true for everything.",
    )
    smoke_prompts: list[str] = Field(min_length=1, description="Prompts of the smoke test.")
    smoke_tokens: int = Field(gt=0, description="Tokens that the smoke test generates.")
    speed: Speed
    limits: Limits = Limits()
    pythons: dict[RuntimeName, str | None] = Field(
        default_factory=dict,
        description="The interpreter of a runtime that is installed in its own environment.",
    )
