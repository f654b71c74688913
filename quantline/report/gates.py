"""Gates: whether a figure meets a limit, as far as the sample that it was measured on can tell."""

import math
import operator
from dataclasses import dataclass

from quantline.config.params import Gate
from quantline.metrics.significance import normal_quantile, paired_bootstrap, wilson

OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
PASSES, FAILS, CANNOT_TELL = "passes", "fails", "cannot tell"
SPREAD = {"prefill_tok_s": "prefill_spread", "decode_tok_s": "decode_spread"}


@dataclass(frozen=True)
class Figure:
    """A measured value, the interval that it stands for (None: it is exact), and what that was drawn from."""

    value: float
    interval: tuple[float, float] | None = None
    n: int | None = None
    unit: str | None = None


def figure(gate: Gate, figures: dict) -> Figure | None:
    """What a gate looks at in the metrics and the speed of a variant; None if it was not measured."""
    stem = gate.metric.removesuffix("_delta")
    delta = gate.on == "delta" or stem != gate.metric
    if counts := _gold(stem, figures):
        lost, won, n = counts["lost"], counts["won"], counts["items"]
        if delta:
            return Figure((won - lost) / n, paired_bootstrap(lost, won, n, gate.level), n, "items")
        return Figure(counts["accuracy"], wilson(counts["accuracy"] * n, n, gate.level), n, "items")
    key = f"{stem}_delta" if delta else stem
    value, n = figures.get(key), figures.get("tokens")
    if not isinstance(value, int | float) or math.isnan(value):
        return None
    if key == "same_top_p":
        return Figure(value, wilson(value * n, n, gate.level), n, "tokens")
    if f"{key}_se" in figures:
        half = normal_quantile(gate.level) * figures[f"{key}_se"]
        return Figure(value, (value - half, value + half), n, "tokens")
    if spread := figures.get(SPREAD.get(key)):  # least and greatest of the repetitions
        return Figure(value, tuple(spread), None, "repetitions")
    return Figure(value)


def _gold(stem: str, figures: dict) -> dict | None:
    """Accuracy, items, lost and won of the whole gold set (gold_accuracy) or of a task (gold_<task>)."""
    if stem == "gold_accuracy" and "gold_items" in figures:
        return {key: figures[f"gold_{key}"] for key in ("accuracy", "items", "lost", "won")}
    return figures.get("gold_tasks", {}).get(stem.removeprefix("gold_")) if stem.startswith("gold_") else None


def verdict(gate: Gate, found: Figure) -> str:
    """`cannot tell` if one end of the interval meets the limit and the other does not. NaN meets none."""
    meets = [bool(OPERATORS[gate.operator](end, gate.threshold)) for end in found.interval or (found.value,)]
    return PASSES if all(meets) else FAILS if not any(meets) else CANNOT_TELL


def needed(gate: Gate, found: Figure) -> dict:
    """How many more tokens or items would settle it: those at which the half width is the distance to the threshold.

    A half width shrinks with the root of their number. `more` is None where no number would (the figure is the
    threshold), or where the figure is not a mean over them.
    """
    distance = abs(gate.threshold - found.value)
    half = abs(found.interval[gate.threshold > found.value] - found.value)
    if not distance or found.n is None:
        return {"more": None, "unit": found.unit}
    return {"more": max(1, math.ceil(found.n * (half / distance) ** 2) - found.n), "unit": found.unit}


def check_gate(gate: Gate, figures: dict) -> dict:
    """The gate with the figure found, its interval, the verdict, what more it needs, whether that counts as passed, and
    all that in words. A figure that is NaN or was not measured fails.
    """
    found = figure(gate, figures)
    if found is None:
        return {**gate.model_dump(), "value": None, "interval": None, "verdict": FAILS, "needed": None, "passed": False,
                "said": f"{_label(gate)} is not measured, the gate wants {gate.operator} {gate.threshold:g}"}
    decided = verdict(gate, found)
    undecided = {"passes": True, "fails": False,
                 "estimate": bool(OPERATORS[gate.operator](found.value, gate.threshold))}[gate.cannot_tell]
    missing = needed(gate, found) if decided == CANNOT_TELL else None
    return {**gate.model_dump(), "value": found.value, "interval": list(found.interval) if found.interval else None,
            "verdict": decided, "needed": missing,
            "passed": undecided if decided == CANNOT_TELL else decided == PASSES,
            "said": _said(gate, found, missing)}


def _label(gate: Gate) -> str:
    return f"the difference in {gate.metric}" if gate.on == "delta" else gate.metric


def _said(gate: Gate, found: Figure, missing: dict | None) -> str:
    wants = f"the gate wants {gate.operator} {gate.threshold:g}"
    if missing is None:
        return f"{_label(gate)} is {found.value:.4g}, {wants}"
    low, high = found.interval
    told = f"{_label(gate)} is {found.value:.4g}, between {low:.4g} and {high:.4g}" + \
        (f" at {100 * gate.level:g} %" if found.n else " over the repetitions") + f", {wants}: it cannot tell"
    if missing["more"] is not None:
        return f"{told}; {missing['more']:,} more {missing['unit']} would settle it"
    return f"{told}; no number of {missing['unit']} is known that would" if found.n is None else \
        f"{told}; the figure is the threshold itself"
