"""What quantline knows about a figure: its name, its interval, where it is shown, and its formula.

A metric is one module: it registers a `Figure`, and with it the function that computes it from the
tokens of the evaluation text. It then stands in metrics/<variant>.json with its standard error, in
the tables that its columns name, and targets can gate on it and rank by it. See CONTRIBUTING.md,
"Add a metric".

This module is light: the command line and params.yaml ask it for names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeGuard

from quantline.registry import Registry

if TYPE_CHECKING:
    from quantline.metrics.token_values import TokenValues

MISSING = "–"  # in a table, where a figure was not measured
MISSING_IN_TERMINAL = "-"

# How the confidence interval of a figure is made (quantline/metrics/interval.py).
IntervalKind = Literal[
    "standard error",  # of a mean over tokens, which is measured beside it under <key>_se
    "share",  # of a share of the tokens: Wilson's
    "spread",  # least and greatest of the repetitions of a speed
    "gold",  # of answers to the gold set: Wilson's, and the paired bootstrap of a difference
]
# The tables that show figures. "other" appears on the page where a plugin has figures for it;
# "model registry" are the tags of the version that MLflow registers; "dvc" is what DVC's own tables
# have of every variant.
Section = Literal["cli", "dvc", "markdown", "quality", "tail", "other", "speed", "model registry"]
# What a table shows beside a value.
Detail = Literal[
    "error",  # its standard error
    "noise",  # the same, and a ~ where the value is within two standard errors of zero
    "difference",  # the difference to the unquantized model, with its error or interval
    "quartiles",  # of the repetitions
]


class Estimate(NamedTuple):
    """A value from a sample, and its standard error where there is one."""

    value: float
    standard_error: float | None = None


Compute = Callable[["TokenValues"], Estimate]


@dataclass(frozen=True)
class Column:
    """How one table shows a figure.

    Attributes:
        heading: Of the column; in the section "model registry" the tag's name, in "dvc" the key.
        format: Python's format of the scaled value.
        scale: What the value is multiplied by.
        detail: What stands beside the value.
        error_format: Of the scaled numbers beside the value.
        order: Columns stand in this order, from left to right.
    """

    heading: str
    format: str = ".3g"
    scale: float = 1.0
    detail: Detail | None = None
    error_format: str = ".2g"
    order: int = 1000


@dataclass(frozen=True)
class Figure:
    """One figure of a variant.

    Attributes:
        key: Its key in metrics/<variant>.json or metrics/<variant>.speed.json.
        label: What sentences call it.
        better: The direction in which variants get better, if there is one.
        interval: How its confidence interval is made; None for a figure that is exact.
        columns: How it is shown, by table.
        scale: What the value is multiplied by in sentences.
        format: Python's format of the scaled value in sentences.
        unit: What follows it in sentences.
        repetitions: Of a median over repetitions, what `_iqr` and `_spread` are appended to for
            the keys of its quartiles and extremes.
        timed: Whether it is worse than it should be where the machine was busy meanwhile.
        compute: Computes it from the tokens; None for a figure that is measured elsewhere.
    """

    key: str
    label: str
    better: Literal["lower", "higher"] | None = None
    interval: IntervalKind | None = None
    columns: Mapping[Section, Column] = field(default_factory=dict)
    scale: float = 1.0
    format: str = ".4g"
    unit: str = ""
    repetitions: str | None = None
    timed: bool = False
    compute: Compute | None = None

    def text(self, value: float) -> str:
        """Return a value as sentences have it."""
        return f"{value * self.scale:{self.format}} {self.unit}".rstrip()


@dataclass(frozen=True)
class TableColumn:
    """A figure in one table.

    Attributes:
        figure: The figure.
        style: How this table shows it.
        missing: What stands in place of a value that was not measured.
    """

    figure: Figure
    style: Column
    missing: str = MISSING

    @property
    def key(self) -> str:
        """The figure's key in JSON files."""
        return self.figure.key

    @property
    def heading(self) -> str:
        """The heading of the column."""
        return self.style.heading

    def text(self, value: float | None) -> str:
        """Return a value as the table shows it; None is one that was not measured."""
        if value is None:
            return self.missing
        return format(value * self.style.scale, self.style.format)


FIGURES: Registry[Figure] = Registry("metric")


def register_figure(figure: Figure) -> Figure:
    """Register a figure that is measured elsewhere, and return it."""
    FIGURES.add(figure.key, figure)
    return figure


def register_metric(figure: Figure) -> Callable[[Compute], Compute]:
    """Return a decorator that registers a figure with the function that computes it.

    The function gets the TokenValues of a variant and returns an Estimate. The standard error, if
    there is one, is stored under the figure's key with `_se` appended.
    """

    def register(compute: Compute) -> Compute:
        FIGURES.add(figure.key, replace(figure, compute=compute))
        return compute

    return register


def figure_of(key: str) -> Figure:
    """Return the figure of a key.

    One that nobody registered is called by its key, and its standard error may stand beside it.
    """
    if key in FIGURES:
        return FIGURES[key]
    return Figure(key, label=key, interval="standard error")


def columns_of(section: Section, missing: str = MISSING) -> list[TableColumn]:
    """Return the columns of a table from left to right; `missing` is what absent values show."""
    columns = []
    for figure in FIGURES.values():
        style = figure.columns.get(section)
        if style is not None:
            columns.append(TableColumn(figure, style, missing))
    return sorted(columns, key=lambda column: (column.style.order, column.key))


def cli_columns() -> list[TableColumn]:
    """Return the columns of the command line's table."""
    return columns_of("cli", MISSING_IN_TERMINAL)


def is_measured(value: Any) -> TypeGuard[float]:
    """Whether a value from a JSON file is a number."""
    return isinstance(value, int | float)
