"""A measured figure with the confidence interval that its sample allows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantline.metrics.figure import Figure, figure_of, is_measured
from quantline.metrics.significance import normal_quantile, paired_bootstrap, wilson


@dataclass(frozen=True)
class Measurement:
    """A measured value.

    Attributes:
        value: The value.
        interval: Its confidence interval; None for a value that is exact.
        count: Tokens or items that it was measured on; None if it is no figure of such a sample.
        unit: What the sample consists of: tokens, items or repetitions.
        busy: Why the figure may be better than it was measured: what else the machine did.
            The interval is then open to that side.
    """

    value: float
    interval: tuple[float, float] | None = None
    count: int | None = None
    unit: str | None = None
    busy: tuple[str, ...] = ()


def measurement(
    metric: str, figures: Mapping[str, Any], level: float, difference: bool = False
) -> Measurement | None:
    """Look up a figure, and make its interval as the registry says.

    A figure that nobody registered has an interval if its standard error stands beside it.

    Args:
        metric: Key of the figure, gold_accuracy or gold_<task>; with `_delta` appended it is the
            difference to the unquantized model.
        figures: All figures of a variant, with what their intervals are made of.
        level: Of the interval.
        difference: Whether the difference is wanted where `metric` does not say so.

    Returns:
        None if the figure was not measured.
    """
    stem = metric.removesuffix("_delta")
    difference = difference or stem != metric
    answers = _gold_answers(stem, figures)
    if answers is not None:
        return _gold_measurement(answers, level, difference)
    key = f"{stem}_delta" if difference else stem
    value = figures.get(key)
    count = figures.get("tokens")
    if not is_measured(value) or math.isnan(value):
        return None
    figure = figure_of(key)
    if figure.interval == "share" and count is not None:
        return Measurement(value, wilson(value * count, count, level), count, "tokens")
    if figure.interval == "standard error" and f"{key}_se" in figures:
        half = normal_quantile(level) * figures[f"{key}_se"]
        return Measurement(value, (value - half, value + half), count, "tokens")
    return _repeated(figure, value, figures)


def _repeated(figure: Figure, value: float, figures: Mapping[str, Any]) -> Measurement:
    """Return a figure that is exact, or the median of repetitions."""
    spread = figures.get(f"{figure.repetitions}_spread") if figure.interval == "spread" else None
    busy = tuple(figures.get("busy") or ()) if figure.timed else ()
    if not spread and not busy:
        return Measurement(value)
    least, greatest = spread or (value, value)
    if busy and figure.better == "lower":
        least = -math.inf
    elif busy:
        greatest = math.inf
    return Measurement(value, (least, greatest), None, "repetitions", busy)


def _gold_answers(stem: str, figures: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return accuracy, items, lost and won of the whole gold set, or of the task gold_<task>.

    None if `stem` is neither, or was not measured.
    """
    if figure_of(stem).interval == "gold" and "gold_items" in figures:
        answers = {key: figures[f"gold_{key}"] for key in ("items", "lost", "won")}
        return answers | {"accuracy": figures[stem]}
    if stem.startswith("gold_"):
        return figures.get("gold_tasks", {}).get(stem.removeprefix("gold_"))
    return None


def _gold_measurement(answers: Mapping[str, Any], level: float, difference: bool) -> Measurement:
    """Return the accuracy on some items, or its difference to the unquantized model's."""
    items = answers["items"]
    if difference:
        lost = answers["lost"]
        won = answers["won"]
        interval = paired_bootstrap(lost, won, items, level)
        return Measurement((won - lost) / items, interval, items, "items")
    accuracy = answers["accuracy"]
    return Measurement(accuracy, wilson(accuracy * items, items, level), items, "items")
