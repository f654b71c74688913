"""Cells and columns of the report's tables, from the registry of figures and the rows."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from quantline.metrics.figure import Section, TableColumn, columns_of, is_measured
from quantline.report.variant import VariantRow

NOISE_ERRORS = 2  # standard errors within which a difference counts as noise
SIGNED = "+z"  # of a format: with its sign, and without one for what rounds to zero


class Cell(NamedTuple):
    """One cell of a table of figures.

    Attributes:
        value: What the column is sorted by; "" for a figure that was not measured.
        text: The figure.
        detail: What stands beside it; "" for nothing.
    """

    value: float | str
    text: str
    detail: str = ""


def figure_cells(section: Section, figures: Mapping[str, Any]) -> list[Cell]:
    """Return a variant's cells in the table of a section, from left to right."""
    return [figure_cell(column, figures) for column in columns_of(section)]


def figure_cell(column: TableColumn, figures: Mapping[str, Any]) -> Cell:
    """Return a figure as a table shows it.

    Args:
        column: Of the table.
        figures: All figures of a variant.
    """
    value = figures.get(column.key)
    if not is_measured(value):
        return Cell("", column.missing)
    text = column.text(value)
    detail = column.style.detail
    if detail in ("error", "noise"):
        error = figures.get(f"{column.key}_se")
        if error is None:
            return Cell(value, text)
        noise = _noise_mark(value, error) if detail == "noise" else ""
        return Cell(value, noise + text, f"± {_error_text(column, error)}")
    if detail == "difference":
        return Cell(value, text, _difference(column, figures))
    if detail == "quartiles":
        return Cell(value, text, _quartiles(column, figures))
    return Cell(value, text)


def _error_text(column: TableColumn, value: float, sign: str = "") -> str:
    """Return a number that stands beside a figure, in the figure's scale."""
    return format(value * column.style.scale, sign + column.style.error_format)


def _noise_mark(difference: float, error: float) -> str:
    """Return "~ " for a difference that is no more than noise."""
    within = -NOISE_ERRORS * error <= difference <= NOISE_ERRORS * error
    return "~ " if within else ""


def _difference(column: TableColumn, figures: Mapping[str, Any]) -> str:
    """Return the difference to the unquantized model, with its interval or standard error."""
    difference = figures.get(f"{column.key}_delta")
    if difference is None:
        return ""
    text = _error_text(column, difference, SIGNED)
    interval = figures.get(f"{column.key}_delta_interval")
    if interval is not None:
        low, high = interval
        noise = "~ " if low <= 0 <= high else ""
        low_text = _error_text(column, low, SIGNED)
        return f"{noise}{text}, {low_text} to {_error_text(column, high, SIGNED)}"
    error = figures.get(f"{column.key}_delta_se")
    if error is None:
        return text
    return f"{_noise_mark(difference, error)}{text} ± {_error_text(column, error)}"


def _quartiles(column: TableColumn, figures: Mapping[str, Any]) -> str:
    """Return the quartiles of the repetitions that a figure is the median of."""
    quartiles = figures.get(f"{column.figure.repetitions}_iqr")
    if quartiles is None:
        return ""
    first, third = quartiles
    return f"{_error_text(column, first)} to {_error_text(column, third)}"


class GateCount(NamedTuple):
    """How many of a variant's gates have a verdict.

    Attributes:
        failing: Required gates that fail.
        optional: Optional gates that fail.
        undecided: Gates that cannot tell.
    """

    failing: int
    optional: int
    undecided: int

    @property
    def value(self) -> int:
        """What the column is sorted by: those that exclude the variant count most."""
        return 100 * self.failing + 10 * self.undecided + self.failing + self.optional


def count_gates(row: VariantRow) -> GateCount:
    """Count a variant's gates by their verdict."""
    failing = [gate for gate in row.gates if gate["verdict"] == "fails"]
    required = sum(gate["required"] for gate in failing)
    undecided = sum(gate["verdict"] == "cannot tell" for gate in row.gates)
    return GateCount(required, len(failing) - required, undecided)


def find_gate(row: VariantRow, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what one of the target's gates says of a variant; None if it was left out."""
    identity = ("metric", "operator", "threshold", "on")
    for gate in row.gates:
        if all(gate[key] == wanted[key] for key in identity):
            return gate
    return None


class TaskMetric(NamedTuple):
    """A column of the table of lm-evaluation-harness.

    Attributes:
        task: Name of the task.
        metric: The harness's name of the metric, with its filter.
        better: "higher", "lower" or, where the harness does not say, "".
    """

    task: str
    metric: str
    better: str


def lm_eval_columns(rows: Sequence[VariantRow]) -> list[TaskMetric]:
    """Return a column for each metric of lm-evaluation-harness that a row has."""
    columns = {}
    for row in rows:
        for task, results in row.lm_eval.items():
            for metric, result in results["metrics"].items():
                better = {True: "higher", False: "lower"}.get(result["higher_is_better"], "")
                columns[task, metric] = TaskMetric(task, metric, better)
    return [columns[key] for key in sorted(columns)]


def describe_machines(rows: Sequence[VariantRow]) -> list[str]:
    """Return what the speeds were measured on and how, a sentence for each that differs."""
    variants: dict[str, list[str]] = {}
    for row in rows:
        if "machine" in row.speed:
            variants.setdefault(_describe_machine(row.speed), []).append(row.variant)
    if len(variants) == 1:
        return [f"{text}." for text in variants]
    return [f"{', '.join(names)}: {text}." for text, names in variants.items()]


def _describe_machine(speed: Mapping[str, Any]) -> str:
    machine = speed["machine"]
    where = [
        machine["cpu"],
        f"{machine['cores']} cores",
        f"{machine['memory_mib'] / 1024:.0f} GiB of memory",
        *machine["gpus"],
        machine["system"],
    ]
    how = (
        f"{speed['threads']} threads, batch {speed['batch']}, a prompt of "
        f"{speed['prompt_tokens']} tokens, {speed['new_tokens']} new tokens, "
        f"{speed['repetitions']} repetitions after a few tokens to warm up"
    )
    return f"{', '.join(where)}: {how}"
